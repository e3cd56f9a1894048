"""Sampling settings in a checkpoint's generation_config.json, which this runtime does not apply.

Its end-of-text ids are applied: see hf_config.py.
"""

import json
from collections.abc import Mapping
from typing import Any

from mtpkern.errors import printable

# Keys that do not affect which tokens are chosen, and values of the others that have no effect.
_UNRELATED = {
    "_from_model_config",
    "transformers_version",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "use_cache",
    "return_dict_in_generate",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "trust_remote_code",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_k": (0,),
    "min_length": (0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "temperature": (1.0,),
    "top_p": (1.0,),
    "typical_p": (1.0,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "length_penalty": (1.0,),
    "guidance_scale": (1.0,),
}


def unapplied_settings(content: Mapping[str, Any]) -> list[str]:
    """The settings that would affect generation, each as "name=value"."""
    return [
        f"{printable(name)}={printable(json.dumps(value))}"
        for name, value in content.items()
        if name not in _UNRELATED and value not in (None, False, [], {}, *_NEUTRAL.get(name, ()))
    ]
