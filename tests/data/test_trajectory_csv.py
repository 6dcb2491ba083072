"""A CSV log as its writer meets it: names, stays, and one line for each mistake."""

import re
from functools import partial

import numpy as np
import pytest

from jaxrl_llm.data import trajectory_csv

read = partial(trajectory_csv.read_csv, state_names=("Ill", "Well"), action_names=("Wait", "Treat"))
HEADER = "patient,time,state,action,reward"


def write(tmp_path, *lines):
    path = tmp_path / "log.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_read_csv_reads_names_and_ignores_other_columns(tmp_path):
    path = write(
        tmp_path,
        "\ufeffward,reward, action,state,time,patient",
        "A,-1,Wait,Ill,0,p9",
        'B,"2",Treat,Ill,1,p9',
        "A,,,Well,2,p9",
        "",
        "A,0.5,Treat,Ill,4,p1",
    )
    log = read(path)
    np.testing.assert_array_equal(log.mask.T, [[1, 1], [1, 0]])
    np.testing.assert_array_equal(log.steps.observation.T, [[0, 0], [0, 0]])
    np.testing.assert_array_equal(log.steps.action.T, [[0, 1], [1, 0]])
    np.testing.assert_array_equal(log.steps.reward.T, [[-1, 2], [0.5, 0]])
    np.testing.assert_array_equal(log.steps.next_observation.T[0], [0, 1])
    np.testing.assert_array_equal(log.steps.terminated.T, [[0, 1], [1, 0]])
    assert log.steps.extras == {}


def test_read_csv_tells_stays_apart_and_keeps_extras(tmp_path):
    path = write(tmp_path, HEADER + ",episode,sofa", "1,0,0,1,0,a,3", "1,0,1,0,1,b,4")
    log = trajectory_csv.read_csv(path, num_states=2, num_actions=2, extras=("sofa",))
    np.testing.assert_array_equal(log.patient, [0, 0])
    np.testing.assert_array_equal(log.steps.extras["sofa"], [[3, 4]])


def test_read_named_finds_the_names(tmp_path):
    path = write(tmp_path, HEADER, "1,0,10,Treat,0", "1,1,9,Wait,1")
    log, states, actions = trajectory_csv.read_named(path)
    assert (states, actions) == (("9", "10"), ("Treat", "Wait"))
    np.testing.assert_array_equal(log.steps.observation.T, [[1, 0]])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "log.csv is empty; write a header and a row for each decision"),
        ((HEADER,), "log.csv has no row; give at least one decision"),
        (("patient,time,state,reward",), ":1: column action is missing; the header has patient, "),
        ((HEADER, "1,0,Sick,Wait,0"), ":2: state is 'Sick'; it must be one of Ill, Well"),
        ((HEADER, "1,0,Ill,Pray,0"), ":2: action is 'Pray'; it must be one of Wait, Treat"),
        ((HEADER, "1,0,Ill,Wait,much"), ":2: reward is 'much'; it must be a number"),
        ((HEADER, "1,0,Ill,Wait,inf"), ":2: reward is inf; it must be finite"),
        ((HEADER, "1,0,Ill,Wait,"), ":2: reward is ''; it must be a number"),
        ((HEADER, "1,0,Ill,Wait,0", "1,1,Ill,,3"), ":3: reward is 3 without an action; write it"),
        ((HEADER, "1,noon,Ill,Wait,0"), ":2: time is 'noon'; it must be a number"),
        ((HEADER, "1,0,Ill,Wait"), ":2: the row has 4 cells; it must have 5 as the header"),
        ((HEADER, "1,0,Ill,Wait,0,9"), ":2: the row has 6 cells; it must have 5 as the header"),
        ((HEADER, "1,0,Ill,Wait,0", "1,3,Ill,Wait,0"), ":3: patient 1 goes from time 0 to 3, not"),
        ((HEADER, "1,1,Ill,Wait,0", "1,0,Ill,Wait,0"), ":3: patient 1 has time 0 after 1; sort by"),
        ((HEADER, "1,0,Ill,Wait,0", "1,0,Ill,Wait,0"), ":3: patient 1 has time 0 twice; keep one"),
    ],
)
def test_read_csv_names_the_fault(lines, message, tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_read_csv_without_a_file_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"none.csv cannot be read: No such file"):
        trajectory_csv.read_csv(tmp_path / "none.csv")


def test_read_csv_refuses_another_encoding(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(HEADER.encode() + b"\n1,0,\xe9,Wait,0\n")
    with pytest.raises(ValueError, match="is not UTF-8; save the file as UTF-8"):
        read(path)
