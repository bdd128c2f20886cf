"""Preference data from inside a model, their files, and LoRA tuning on them.

Data
    `PreferencePair`, `PreferenceData`
        Two answers to one prompt about images, the chosen and the rejected one; a sequence of such pairs.
    `from_table`, `from_answers`, `scored_pair`
        Pairs from a table of the user, from answers judged right or wrong, and from scored candidates. Pairs from diagnoses are
        made by `diagnosis.preference_pairs`.
    `preference_formats`
        The open table of file formats (`mitigation.preference.formats`); `write_preferences` and `read_preferences` use it.

Tuning
    `tune`, `TuneOptions`
        Train low-rank adapters by DPO, or by SFT on the chosen answers; the epoch is chosen on validation images.
    `Adapter`
        The trained matrices: a folder in the format of PEFT, and a tuned copy of the model, which can be probed and patched.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
