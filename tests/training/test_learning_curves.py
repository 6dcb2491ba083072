"""A picture of several learners has a line, a band and a name for each."""

import numpy as np
from matplotlib.image import imread

from jaxrl_llm.training.learning_curves import Panel, save
from jaxrl_llm.training.table_learning import Learned


def test_save_draws_every_curve_in_its_own_colour(tmp_path):
    time = np.arange(1.0, 6)
    curves = {
        name: Learned(time=time, value=level + np.zeros((3, 5)), state=None)
        for name, level in (("first", 0.2), ("second", 0.8))
    }
    panel = Panel("Two learners", curves, {"optimum": 1.0}, "Steps", "Value")
    save([panel], tmp_path / "picture.png", "A title")
    pixels = np.round(imread(tmp_path / "picture.png")[..., :3] * 255).reshape(-1, 3)
    for color in ((0, 114, 178), (213, 94, 0)):
        assert np.sum(np.all(pixels == color, axis=1)) > 100
