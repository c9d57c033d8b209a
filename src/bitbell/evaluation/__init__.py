"""A model and batches -> numbers: loss, perplexity, bits per byte, accuracy, entropy of the codes."""

from bitbell.evaluation.classification import (
    ClassificationScore,
    Guess,
    ImageEvaluation,
    classify,
    evaluate_images,
    image_input_of,
)
from bitbell.evaluation.codes import LayerCodes, layer_codes, mean_entropy, weight_entropies
from bitbell.evaluation.loss import LanguageModelLoss, logits_of, measure_loss
from bitbell.evaluation.summary import Evaluation, evaluate

__all__ = [
    "ClassificationScore",
    "Evaluation",
    "Guess",
    "ImageEvaluation",
    "LanguageModelLoss",
    "LayerCodes",
    "classify",
    "evaluate",
    "evaluate_images",
    "image_input_of",
    "layer_codes",
    "logits_of",
    "mean_entropy",
    "measure_loss",
    "weight_entropies",
]
