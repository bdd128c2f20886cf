"""Import everything that programs of the tests use; compute nothing."""

from __future__ import annotations

import pandas as pd
import sklearn.linear_model
import sklearn.svm
from transformers.models.clip import image_processing_pil_clip, modeling_clip
from transformers.models.llama import modeling_llama
from transformers.models.llava import modeling_llava, processing_llava

import experiments.pipeline
import experiments.report
import groundscope
from experiments.cli import launch, main
from lvlm.tiny import architecture

LIBRARIES = (
    pd,
    sklearn.linear_model,
    sklearn.svm,
    image_processing_pil_clip,
    modeling_clip,
    modeling_llama,
    modeling_llava,
    processing_llava,
)
OWN = (
    experiments.pipeline,
    experiments.report,
    launch,
    main,
    architecture,
    *(getattr(groundscope, name) for name in groundscope.__all__),
)
