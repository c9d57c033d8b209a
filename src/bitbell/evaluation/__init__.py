"""A model and batches -> numbers: loss, perplexity, bits per byte, entropy of the codes."""

from bitbell.evaluation.codes import LayerCodes, layer_codes, mean_entropy, weight_entropies
from bitbell.evaluation.loss import LanguageModelLoss, logits_of, measure_loss
from bitbell.evaluation.summary import Evaluation, evaluate

__all__ = [
    "Evaluation",
    "LanguageModelLoss",
    "LayerCodes",
    "evaluate",
    "layer_codes",
    "logits_of",
    "mean_entropy",
    "measure_loss",
    "weight_entropies",
]
