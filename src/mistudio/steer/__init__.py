"""Steering: text written with features of an SAE added to the model's activations, beside text written without."""

from mistudio.steer.apply import Pushes, Trace, random_direction, steered
from mistudio.steer.arms import STEERED, UNSTEERED, Arm, Written, write_arms
from mistudio.steer.compare import Comparison, compare, prompt_norm
from mistudio.steer.controls import comparison_arms, random_direction_arm, random_feature_arm, sweep_arms
from mistudio.steer.dose import Dose, DoseResponse, dose_response
from mistudio.steer.effects import Interval, bootstrap, effect
from mistudio.steer.experiment import (
    Experiment,
    Outcome,
    Record,
    check_record,
    record,
    rows_tokens,
    run_experiment,
    weights_sha256,
)
from mistudio.steer.features import Features, Steering, random_controls, steering_edit, steering_vector
from mistudio.steer.lab import Known, Lab
from mistudio.steer.measures import Measures, Read, distinct, longest_repeat, read_again, side_effects, word_share
from mistudio.steer.methods import METHODS, Method
from mistudio.steer.neuronpedia import (
    Divergence,
    NPMessage,
    NPRecord,
    NPRequest,
    Parity,
    chat_prompt,
    check_source,
    np_experiment,
    np_lab,
    np_parity,
    np_pushes,
    np_site,
    read_np,
    unit_rows,
)
from mistudio.steer.np_legacy import BEFORE_NOVEMBER_2025, DEFECTS, np_legacy
from mistudio.steer.plots import plot_dose_response, plot_tracks
from mistudio.steer.positions import Place, positions_mask
from mistudio.steer.push import Push, When, flipped
from mistudio.steer.report import MEASURES, ArmSummary, Strengths, by_seed, difference, strengths
from mistudio.steer.scores import input_scores, logit_lens, output_scores
from mistudio.steer.snippet import write_program
from mistudio.steer.targeted import Effects, fit_effects, fitted
from mistudio.steer.toward import first_tokens, toward
from mistudio.steer.tracking import Track, track
from mistudio.steer.vector_files import SUFFIXES, added_vectors, read_vector, write_vectors
from mistudio.steer.vectors import mean_difference, principal_direction
from mistudio.steer.views import FeatureSteering, mistudio_generate

__all__ = [
    "BEFORE_NOVEMBER_2025",
    "DEFECTS",
    "MEASURES",
    "METHODS",
    "STEERED",
    "SUFFIXES",
    "UNSTEERED",
    "Arm",
    "ArmSummary",
    "Comparison",
    "Divergence",
    "Dose",
    "DoseResponse",
    "Effects",
    "Experiment",
    "FeatureSteering",
    "Features",
    "Interval",
    "Known",
    "Lab",
    "Measures",
    "Method",
    "NPMessage",
    "NPRecord",
    "NPRequest",
    "Outcome",
    "Parity",
    "Place",
    "Push",
    "Pushes",
    "Read",
    "Record",
    "Steering",
    "Strengths",
    "Trace",
    "Track",
    "When",
    "Written",
    "added_vectors",
    "bootstrap",
    "by_seed",
    "chat_prompt",
    "check_record",
    "check_source",
    "compare",
    "comparison_arms",
    "difference",
    "distinct",
    "dose_response",
    "effect",
    "first_tokens",
    "fit_effects",
    "fitted",
    "flipped",
    "input_scores",
    "logit_lens",
    "longest_repeat",
    "mean_difference",
    "mistudio_generate",
    "np_experiment",
    "np_lab",
    "np_legacy",
    "np_parity",
    "np_pushes",
    "np_site",
    "output_scores",
    "plot_dose_response",
    "plot_tracks",
    "positions_mask",
    "principal_direction",
    "prompt_norm",
    "random_controls",
    "random_direction",
    "random_direction_arm",
    "random_feature_arm",
    "read_again",
    "read_np",
    "read_vector",
    "record",
    "rows_tokens",
    "run_experiment",
    "side_effects",
    "steered",
    "steering_edit",
    "steering_vector",
    "strengths",
    "sweep_arms",
    "toward",
    "track",
    "unit_rows",
    "weights_sha256",
    "word_share",
    "write_arms",
    "write_program",
    "write_vectors",
]
