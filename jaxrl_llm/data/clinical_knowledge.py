"""What the synthetic clinic knows: conditions, drugs and what forbids a drug, as tables.

SYNTHETIC, a teaching example; research only, not for clinical use. Adults only, one problem at a
time, one usual dose a drug; a condition lists its drugs in order of preference, and the right one
is the first that nothing in the patient forbids.

Source: a strong simplification of NICE guidelines NG138 (pneumonia), NG141 (cellulitis), NG84
(sore throat, with clindamycin from the IDSA guideline of 2012), NG109 (lower urinary tract
infection), NG158 (pulmonary embolism, with enoxaparin and fondaparinux from the ESC guideline of
2019), NG185 (acute coronary syndromes), CG126 (stable angina), NG196 (atrial fibrillation), NG136
and NG133 (hypertension, also in pregnancy), NG28 (type 2 diabetes), NG219 (gout), CG150 (migraine),
NG222 and CG91 (depression), CG184 (reflux); contraindications and interactions in the manner of
the British National Formulary; alarming vital signs are those that score 3 in NEWS2 (Royal
College of Physicians, 2017).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Drug:
    """One drug.

    Attributes:
      drug_class: its family.
      dose: the usual adult dose.
      forbidden_by: comorbidities, current drugs and allergies ("penicillin allergy") that forbid
        it. An allergy to the drug itself always does and is not listed.
    """

    drug_class: str
    dose: str
    forbidden_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Condition:
    """One condition.

    Attributes:
      hallmarks: findings of which a patient has one; each belongs to this condition only.
      findings: other findings, of which a patient has one or two.
      drugs: treatments, the preferred one first.
      follow_up: a key of `clinical_grammar.FOLLOW_UP`, unless a vital sign is alarming.
      lay_name: what the patient is told it is.
      purpose: what the patient is told the treatment does.
      ages: years, both ends included.
      sexes: who can have it.
      vitals: ranges that differ from `NORMAL_VITALS`.
      alarms: the vital signs that may be alarming.
    """

    hallmarks: tuple[str, ...]
    findings: tuple[str, ...]
    drugs: tuple[str, ...]
    follow_up: str
    lay_name: str
    purpose: str
    ages: tuple[int, int]
    sexes: tuple[str, ...] = ("man", "woman")
    vitals: dict[str, tuple[float, float]] = field(default_factory=dict)
    alarms: tuple[str, ...] = ()


# Temperature in C, heart rate in beats a minute, pressures in mmHg, oxygen saturation in %.
NORMAL_VITALS = {
    "temperature": (36.3, 37.4),
    "heart_rate": (60, 92),
    "systolic": (112, 138),
    "diastolic": (66, 84),
    "oxygen_saturation": (95, 99),
}
# Both ends included: the ranges from which an alarming value is drawn; their inner end is the
# threshold of NEWS2.
ALARMING_VITALS = {
    "heart_rate": (131, 150),
    "systolic": (78, 90),
    "oxygen_saturation": (85, 91),
}
FEVER = {"temperature": (38.0, 39.6), "heart_rate": (88, 116)}

COMORBIDITIES = (
    "asthma",
    "heart failure",
    "ischaemic heart disease",
    "peptic ulcer",
    "pregnancy",
    "severe kidney disease",
)
CURRENT_DRUGS = (
    "carbamazepine",
    "clopidogrel",
    "lithium",
    "methotrexate",
    "omeprazole",
    "ramipril",
    "sertraline",
    "sildenafil",
    "simvastatin",
    "spironolactone",
    "sumatriptan",
    "warfarin",
)
FAMILY_ALLERGIES = ("aspirin", "heparin", "penicillin")
HARMLESS_ALLERGIES = ("latex", "peanut")
# Comorbidity or condition -> current drugs that nobody is on in these circumstances.
IMPLAUSIBLE = {
    "acute coronary syndrome": ("sumatriptan",),
    "pregnancy": (
        "lithium",
        "methotrexate",
        "sildenafil",
        "simvastatin",
        "spironolactone",
        "warfarin",
    ),
    "severe kidney disease": ("lithium", "methotrexate", "spironolactone"),
    "stable angina": ("sumatriptan",),
}
# Classes that one specialist might well prescribe together; none of them is plainly wrong for a
# condition that another one treats.
RELATED_CLASSES = (
    (
        "ACE inhibitor",
        "anticoagulant",
        "antiplatelet",
        "beta blocker",
        "calcium channel blocker",
        "cardiac glycoside",
        "nitrate",
    ),
    ("analgesic", "anti-inflammatory", "triptan"),
)

DRUGS = {
    "amlodipine": Drug("calcium channel blocker", "5 mg once daily", ("pregnancy", "simvastatin")),
    "amoxicillin": Drug(
        "antibiotic", "500 mg three times daily", ("penicillin allergy", "methotrexate")
    ),
    "apixaban": Drug(
        "anticoagulant", "10 mg twice daily", ("pregnancy", "carbamazepine", "warfarin")
    ),
    "aspirin": Drug("antiplatelet", "300 mg once"),
    "bisoprolol": Drug("beta blocker", "2.5 mg once daily", ("asthma",)),
    "clarithromycin": Drug(
        "antibiotic",
        "500 mg twice daily",
        ("pregnancy", "carbamazepine", "simvastatin", "warfarin"),
    ),
    "clindamycin": Drug("antibiotic", "300 mg three times daily"),
    "clopidogrel": Drug("antiplatelet", "300 mg once", ("omeprazole",)),
    "colchicine": Drug(
        "anti-inflammatory",
        "500 micrograms twice daily",
        ("pregnancy", "severe kidney disease", "simvastatin"),
    ),
    "digoxin": Drug("cardiac glycoside", "125 micrograms once daily", ("severe kidney disease",)),
    "diltiazem": Drug(
        "calcium channel blocker",
        "60 mg three times daily",
        ("heart failure", "carbamazepine", "simvastatin"),
    ),
    "doxycycline": Drug("antibiotic", "100 mg twice daily", ("pregnancy",)),
    "enoxaparin": Drug(
        "anticoagulant",
        "1 mg/kg twice daily",
        ("heparin allergy", "severe kidney disease", "warfarin"),
    ),
    "erythromycin": Drug(
        "antibiotic", "500 mg four times daily", ("carbamazepine", "simvastatin", "warfarin")
    ),
    "famotidine": Drug("acid suppressant", "20 mg twice daily", ("severe kidney disease",)),
    "flucloxacillin": Drug(
        "antibiotic", "500 mg four times daily", ("penicillin allergy", "methotrexate")
    ),
    "fondaparinux": Drug(
        "anticoagulant", "7.5 mg once daily", ("severe kidney disease", "warfarin")
    ),
    "fosfomycin": Drug("antibiotic", "3 g once"),
    "insulin glargine": Drug("antidiabetic", "10 units once daily"),
    "isosorbide mononitrate": Drug("nitrate", "20 mg twice daily", ("sildenafil",)),
    "labetalol": Drug("beta blocker", "100 mg twice daily", ("asthma",)),
    "lansoprazole": Drug("acid suppressant", "30 mg once daily", ("methotrexate",)),
    "linagliptin": Drug("antidiabetic", "5 mg once daily", ("pregnancy", "carbamazepine")),
    "metformin": Drug("antidiabetic", "500 mg twice daily", ("severe kidney disease",)),
    "mirtazapine": Drug("antidepressant", "15 mg at night"),
    "naproxen": Drug(
        "anti-inflammatory",
        "500 mg twice daily",
        (
            "aspirin allergy",
            "heart failure",
            "ischaemic heart disease",
            "peptic ulcer",
            "pregnancy",
            "severe kidney disease",
            "lithium",
            "methotrexate",
            "warfarin",
        ),
    ),
    "nitrofurantoin": Drug("antibiotic", "100 mg twice daily", ("severe kidney disease",)),
    "omeprazole": Drug("acid suppressant", "20 mg once daily", ("clopidogrel", "methotrexate")),
    "paracetamol": Drug("analgesic", "1 g four times daily"),
    "phenoxymethylpenicillin": Drug(
        "antibiotic", "500 mg four times daily", ("penicillin allergy", "methotrexate")
    ),
    "prednisolone": Drug("anti-inflammatory", "30 mg once daily"),
    "ramipril": Drug(
        "ACE inhibitor", "2.5 mg once daily", ("pregnancy", "lithium", "spironolactone")
    ),
    "sertraline": Drug("antidepressant", "50 mg once daily", ("sumatriptan", "warfarin")),
    "sumatriptan": Drug("triptan", "50 mg once", ("ischaemic heart disease", "sertraline")),
    "ticagrelor": Drug("antiplatelet", "180 mg once", ("carbamazepine",)),
    "trimethoprim": Drug(
        "antibiotic",
        "200 mg twice daily",
        ("pregnancy", "methotrexate", "ramipril", "spironolactone"),
    ),
}

CONDITIONS = {
    "acute coronary syndrome": Condition(
        hallmarks=("crushing chest pain", "chest pain spreading to the left arm"),
        findings=("sweating", "nausea", "shortness of breath"),
        drugs=("aspirin", "clopidogrel", "ticagrelor"),
        follow_up="admission",
        lay_name="a heart attack or a threatened one",
        purpose="this drug stops clots from growing",
        ages=(45, 88),
        vitals={"heart_rate": (80, 112), "oxygen_saturation": (93, 98)},
        alarms=("systolic",),
    ),
    "atrial fibrillation": Condition(
        hallmarks=("an irregularly irregular pulse", "irregular palpitations"),
        findings=("tiredness", "dizziness", "shortness of breath"),
        drugs=("bisoprolol", "diltiazem", "digoxin"),
        follow_up="1 week",
        lay_name="an irregular heartbeat",
        purpose="this drug slows a racing heart",
        ages=(50, 88),
        vitals={"heart_rate": (104, 128)},
        alarms=("heart_rate",),
    ),
    "cellulitis": Condition(
        hallmarks=("spreading redness of the leg", "a hot red swollen shin"),
        findings=("fever", "skin tenderness", "shivering"),
        drugs=("flucloxacillin", "doxycycline", "erythromycin"),
        follow_up="2 days",
        lay_name="a skin infection",
        purpose="this drug clears the infection",
        ages=(19, 85),
        vitals=FEVER,
        alarms=("systolic",),
    ),
    "depression": Condition(
        hallmarks=("low mood for months", "loss of interest in everything"),
        findings=("poor sleep", "tiredness", "poor appetite"),
        drugs=("sertraline", "mirtazapine"),
        follow_up="2 weeks",
        lay_name="depression, an illness and not a weakness",
        purpose="this drug lifts the mood over some weeks",
        ages=(20, 75),
    ),
    "gout": Condition(
        hallmarks=("a hot swollen big toe", "sudden pain in the big toe"),
        findings=("joint tenderness", "redness over the joint", "trouble walking"),
        drugs=("naproxen", "colchicine", "prednisolone"),
        follow_up="1 week",
        lay_name="gout, crystals in a joint",
        purpose="this drug calms the joint",
        ages=(35, 85),
    ),
    "hypertension": Condition(
        hallmarks=("raised blood pressure on three visits", "high home blood pressure readings"),
        findings=("mild headache", "dizziness", "a family history of stroke"),
        drugs=("ramipril", "amlodipine", "labetalol"),
        follow_up="4 weeks",
        lay_name="high blood pressure",
        purpose="this drug lowers it and protects the heart",
        ages=(25, 54),
        vitals={"systolic": (152, 178), "diastolic": (94, 108)},
    ),
    "migraine": Condition(
        hallmarks=("throbbing headache on one side", "headache after zigzag lights"),
        findings=("nausea", "dislike of light", "dislike of noise"),
        drugs=("sumatriptan", "naproxen", "paracetamol"),
        follow_up="4 weeks",
        lay_name="a migraine",
        purpose="this drug eases the attack",
        ages=(18, 60),
    ),
    "pneumonia": Condition(
        hallmarks=("cough with rusty sputum", "cough with crackles in one lung"),
        findings=("fever", "shortness of breath", "shivering"),
        drugs=("amoxicillin", "doxycycline", "erythromycin"),
        follow_up="2 days",
        lay_name="a lung infection",
        purpose="this drug clears the infection",
        ages=(18, 88),
        vitals=FEVER | {"oxygen_saturation": (92, 96)},
        alarms=("oxygen_saturation", "systolic"),
    ),
    "pulmonary embolism": Condition(
        hallmarks=("sharp chest pain with a swollen calf", "sudden breathlessness after a flight"),
        findings=("a fast pulse", "coughing blood", "dizziness"),
        drugs=("apixaban", "enoxaparin", "fondaparinux"),
        follow_up="admission",
        lay_name="a blood clot in the lung",
        purpose="this drug stops clots from growing",
        ages=(20, 85),
        vitals={"heart_rate": (100, 126), "oxygen_saturation": (92, 95)},
        alarms=("oxygen_saturation",),
    ),
    "reflux disease": Condition(
        hallmarks=("heartburn after meals", "acid rising into the throat"),
        findings=("belching", "a night cough", "a sour taste"),
        drugs=("omeprazole", "lansoprazole", "famotidine"),
        follow_up="4 weeks",
        lay_name="acid reflux",
        purpose="this drug reduces stomach acid",
        ages=(20, 80),
    ),
    "stable angina": Condition(
        hallmarks=("chest tightness on exertion", "chest pain on stairs that rest relieves"),
        findings=("no pain at rest", "tiredness", "shortness of breath"),
        drugs=("bisoprolol", "amlodipine", "isosorbide mononitrate"),
        follow_up="2 weeks",
        lay_name="angina, narrowed heart arteries",
        purpose="this drug eases the work of the heart",
        ages=(45, 85),
    ),
    "streptococcal pharyngitis": Condition(
        hallmarks=("a sore throat with pus on the tonsils", "a sore throat with tender neck nodes"),
        findings=("fever", "no cough", "painful swallowing"),
        drugs=("phenoxymethylpenicillin", "clarithromycin", "clindamycin"),
        follow_up="1 week",
        lay_name="a bacterial throat infection",
        purpose="this drug clears the infection",
        ages=(18, 50),
        vitals=FEVER,
    ),
    "type 2 diabetes": Condition(
        hallmarks=("thirst with high blood sugar", "a raised HbA1c on two tests"),
        findings=("passing much urine", "tiredness", "blurred vision"),
        drugs=("metformin", "linagliptin", "insulin glargine"),
        follow_up="3 months",
        lay_name="diabetes, too much sugar in the blood",
        purpose="this drug lowers the sugar",
        ages=(35, 82),
    ),
    "urinary tract infection": Condition(
        hallmarks=("burning when passing urine", "cloudy urine with nitrites"),
        findings=("frequent urination", "lower abdominal pain", "urgency"),
        drugs=("nitrofurantoin", "trimethoprim", "fosfomycin"),
        follow_up="2 days",
        lay_name="a bladder infection",
        purpose="this drug clears the infection",
        ages=(18, 85),
        sexes=("woman",),
        vitals={"temperature": (36.6, 37.8)},
        alarms=("systolic",),
    ),
}

# What a patient may be allergic to: a family, a single drug, or something else altogether.
ALLERGIES = tuple(sorted({*FAMILY_ALLERGIES, *HARMLESS_ALLERGIES, *DRUGS}))
