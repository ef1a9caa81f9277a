"""Fields of other servers and newer APIs: one table of what becomes of each.

Understood under its other name; or accepted where its value changes nothing, and refused by name
where it would change the answer. What is in no table and in no schema is ignored, as OpenAI's own
clients need it; null always is.
"""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic_core import PydanticCustomError

from moestro.server.contract import UNSUPPORTED

ALIASES = {
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "n_cmpl": "n",
    "repeat_penalty": "repetition_penalty",
    "stop_sequence": "stop",
    "stop_sequences": "stop",
    "typical": "typical_p",
    "typ_p": "typical_p",
    "include_stop": "include_stop_str_in_output",
    "ignore_eos_token": "ignore_eos",
}

_OFF: tuple[object, ...] = (False,)
_NONE: tuple[object, ...] = ("", [], {}, False)

# Field -> the values that change nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    # other ways to constrain the answer
    "grammar": _NONE,
    "grammar_triggers": _NONE,
    "ebnf": _NONE,
    "guided_grammar": _NONE,
    "structural_tag": _NONE,
    "bad_words": _NONE,
    "bad_words_ids": _NONE,
    "banned_strings": _NONE,
    "banned_tokens": _NONE,
    "custom_token_bans": _NONE,
    "allowed_token_ids": (),
    "logits_processors": _NONE,
    # other ways to sample
    "typical_p": (1, 0),
    "tfs_z": (1, 0),
    "tfs": (1, 0),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "nsigma": (-1, 0),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "smoothing_factor": (0,),
    "mirostat": (0, False),
    "mirostat_mode": (0, False),
    "dynatemp_range": (0,),
    "dynamic_temperature": _OFF,
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "adaptive_target": (-1, 0),
    "temperature_last": _OFF,
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "penalty_alpha": (0,),
    "cfg_scale": (1,),
    "guidance_scale": (1,),
    "negative_prompt": _NONE,
    "samplers": ([],),
    "sampler_order": ([],),
    "use_beam_search": _OFF,
    "num_beams": (1,),
    "length_penalty": (1, 0),
    "early_stopping": _OFF,
    "do_sample": (True,),
    # other inputs and outputs
    "suffix": ("",),
    "prompt_embeds": (),
    "images": _NONE,
    "image_data": _NONE,
    "audio": (),
    "modalities": (["text"], []),
    "prediction": (),
    "web_search_options": (),
    "truncate_prompt_tokens": (),
    "truncation": ("disabled",),
    "return_token_ids": _OFF,
    "return_tokens": _OFF,
    "return_tokens_as_token_ids": _OFF,
    "detokenize": (True,),
    "spaces_between_special_tokens": (True,),
    "n_probs": (0,),
    "n_indent": (0,),
    "t_max_predict_ms": (0, -1),
    "response_fields": ([],),
    "lora": ([],),
    "lora_path": (),
    "lora_adapters": ([],),
    "kv_transfer_params": (),
    "chat_template": _NONE,
}

# How far back penalties look: nothing, where nothing is penalized, and all of it here.
WINDOWS: dict[str, tuple[object, ...]] = {
    "repeat_last_n": (-1,),
    "repetition_penalty_range": (0, -1),
}
_PENALTIES = {"repetition_penalty": (1,), "presence_penalty": (0,), "frequency_penalty": (0,)}

# What the one endpoint serves and the other does not.
NEUTRAL_ON_COMPLETIONS: dict[str, tuple[object, ...]] = {
    "messages": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "top_logprobs": (0,),
    "chat_template_kwargs": ({},),
    "continue_final_message": _OFF,
}
NEUTRAL_ON_CHAT: dict[str, tuple[object, ...]] = {
    "prompt": ("", []),
    "echo": _OFF,
    "best_of": (1,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "documents": ([],),
    "prompt_logprobs": _OFF,
    "add_special_tokens": _OFF,
    "verbosity": ("medium",),
    "thinking_budget": (-1,),
    "reasoning_budget": (-1,),
    "include_reasoning": (True,),
    "separate_reasoning": (True,),
}


def understood(raw: object, neutral: Mapping[str, tuple[object, ...]]) -> object:
    """The body with the names that are served here. `neutral`: of this endpoint, beside NEUTRAL.

    Raises PydanticCustomError for a field that would change the answer and is not served.
    """
    if not isinstance(raw, dict):
        return raw
    body: dict[str, Any] = dict(raw)
    for alias, name in ALIASES.items():
        value = body.pop(alias, None)
        if value is None:
            continue
        if body.get(name) not in (None, value):
            raise PydanticCustomError(
                "two_names", "{param}: means {name}, which differs", {"param": alias, "name": name}
            )
        body[name] = value
    penalizes = any(not is_neutral(body.get(name), off) for name, off in _PENALTIES.items())
    for table in (NEUTRAL, WINDOWS if penalizes else {}, neutral):
        for name, values in table.items():
            if name in body and not is_neutral(body[name], values):
                raise PydanticCustomError(
                    UNSUPPORTED, "{param}: not supported, leave it out", {"param": name}
                )
    return body


def is_neutral(value: object, neutral: tuple[object, ...]) -> bool:
    """True == 1 in Python, but not in a request."""
    return value is None or any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral
    )


def documented(neutral: Mapping[str, tuple[object, ...]]) -> Callable[[dict[str, Any]], None]:
    """For the OpenAPI document of a request: what is understood, and what is refused."""

    def add(schema: dict[str, Any]) -> None:
        properties = schema["properties"]
        for name, values in {**NEUTRAL, **neutral}.items():
            properties[name] = {
                "enum": [None, *values],
                "description": "Not supported: only a value that changes nothing is accepted.",
            }
        for alias, name in ALIASES.items():
            if name in properties and alias not in properties:
                properties[alias] = {**properties[name], "description": f"The same as {name}."}

    return add
