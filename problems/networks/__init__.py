"""Recipes for neural networks, one a file: y is the weights of a module, and data come in batches."""

from bilevel.problems.networks.byte_gpt import byte_gpt as byte_gpt
from bilevel.problems.networks.language_sources import (
    LanguageSources as LanguageSources,
    SourceBatches as SourceBatches,
    language_sources as language_sources,
)
from bilevel.problems.networks.text_sources import python_texts as python_texts
