"""Ask a model questions, parse its answers, and score them, as the released scorers of benchmarks do.

Answers:

`answering`
    Ask a model every question of a dataset, also under several conditions.
`result`
    `Answer`, `BehaviorResult` and rates such as accuracy, with intervals clustered by image.
`parsing`
    Rules that parse generated text into answers.
`answer_files`
    Read the answers of any model from files of many tools, and match them to questions.

Benchmarks:

`pope`, `pope_answer_files`, `pope_scores`
    POPE: does the model claim that absent objects are in the image?
`mme`
    MME: accuracy of each subtask over questions and over images.
`amber`
    AMBER: does the model deny false claims?
`chair`, `chair_released_objects`
    CHAIR: objects that captions name but the image does not contain.
`benchmarks`
    Benchmarks in their released files: questions, answer files and verdicts, scored by the released rules.
`card`
    The evaluation card: frequency and severity of errors by benchmark, level and task, of several models.
`judge_files`
    Benchmarks with a judge model: requests for the judge, and scores of its verdicts.

Descriptions in free text:

`free_text`
    Objects, attributes and relations that a description names, judged by the annotations of its image.

Analysis:

`metrics`
    The open table of metrics that a run reports.
`comparison`
    The paired difference of two systems, with interval and exact test.
`data_audit`
    Causes of errors in data, and error rates by cause.
`taxonomy`
    Wrong answers by level and kind: frequency, severity and harm.

Of the public names, `amber`, `benchmarks`, `card`, `judge_files`, `metrics`, `mme` and `taxonomy` are modules; `chair` and
`pope` are functions.
"""

import lazy_loader

from groundscope.core.packages import check_packages

check_packages()
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
