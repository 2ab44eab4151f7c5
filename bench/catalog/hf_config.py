"""From a Hugging Face ``config.json`` to a :class:`ModelArch`: what each family means by the same and by other keys."""

from __future__ import annotations

from typing import Any

from bench.catalog.arch import AttentionKind, LayerKind, Mla, ModelArch, Moe
from bench.catalog.quant import short_dtype
from bench.errors import BadInput

_LAYER_TYPES: dict[str, AttentionKind] = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
}
#: Families that the arithmetic here does not describe: state-space, linear-attention, encoder or compressed-cache layers.
_UNSUPPORTED = (
    "mamba",
    "mamba2",
    "jamba",
    "bamba",
    "falcon_h1",
    "granitemoehybrid",
    "nemotron_h",
    "qwen3_next",
    "qwen3_5",
    "minimax",
    "minimax_text_01",
    "kimi_linear",
    "rwkv",
    "t5",
    "bart",
    "whisper",
    "bert",
    "deepseek_v32",
    "deepseek_v4",
)
#: Families whose parameter arithmetic was checked against a published count (tests/catalog).
_KNOWN = (
    "llama",
    "llama4",
    "llama4_text",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
    "gptj",
)


class _Config:
    """The text part of a config, with clear errors for keys that are missing or no positive integer."""

    def __init__(self, data: dict[str, Any], name: str) -> None:
        self.data, self.name = data, name

    def get(self, *keys: str, default: Any = None) -> Any:
        for key in keys:
            if self.data.get(key) is not None:
                return self.data[key]
        return default

    def whole(self, *keys: str, default: int | None = None) -> int:
        value = self.get(*keys, default=default)
        if value is None:
            raise BadInput(f"{keys[0]} is missing", where=f"{self.name}: config", next_step="add it")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value > 10**12:
            raise BadInput(f"{keys[0]}: expected a whole number > 0, got {value!r}", where=f"{self.name}: config")
        return value

    def count(self, *keys: str) -> int:
        """A whole number that may be absent, null or 0: then 0."""
        value = self.get(*keys, default=0)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 10**12:
            raise BadInput(f"{keys[0]}: expected a whole number, got {value!r}", where=f"{self.name}: config")
        return value

    def indices(self, key: str) -> list[int]:
        """A list of layer numbers that may be absent."""
        value = self.get(key, default=[])
        if not isinstance(value, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in value):
            raise BadInput(f"{key}: expected a list of layer numbers", where=f"{self.name}: config")
        return value


def read_config(config: dict[str, Any], name: str) -> ModelArch:
    """See :meth:`ModelArch.from_hf_config`."""
    if not isinstance(config, dict):
        raise BadInput("expected the keys and values of a config.json", where=name)
    nested = config.get("text_config")
    text: dict[str, Any] = nested if isinstance(nested, dict) else {}
    c = _Config({**config, **text}, name)
    model_type = str(text.get("model_type") or config.get("model_type") or "")
    if model_type in _UNSUPPORTED or c.get("is_encoder_decoder"):
        what = f"model_type {model_type!r} has layers that the catalogue's arithmetic does not cover"
        raise BadInput(what, where=name, next_step="measure it with `bench run` instead of predicting it")
    notes = [] if model_type in _KNOWN else [f"model_type {model_type or 'unknown'!r} read as a Llama-like decoder"]
    hidden = c.whole("hidden_size", "n_embd", "d_model")
    num_layers = c.whole("num_hidden_layers", "n_layer", "num_layers")
    heads = c.whole("num_attention_heads", "n_head")
    kv_heads = c.whole("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise BadInput(f"{heads} heads are not a multiple of {kv_heads} KV heads", where=f"{name}: config")
    if num_layers > 10_000:
        raise BadInput(f"num_hidden_layers: {num_layers} is not a real model", where=f"{name}: config")
    gptj = model_type == "gptj"
    moe = _moe(c, model_type)
    intermediate = c.get("intermediate_size_mlp", "intermediate_size", "n_inner", "ffn_dim")
    if intermediate is None:
        intermediate = 4 * hidden
    attention_bias = bool(c.get("attention_bias", default=False))
    qwen2 = model_type in ("qwen2", "qwen2_moe")
    return ModelArch(
        name=name,
        model_type=model_type or "llama",
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=c.whole("head_dim", default=max(1, hidden // heads)),
        intermediate_size=_Config({"intermediate_size": intermediate}, name).whole("intermediate_size"),
        vocab_size=c.whole("vocab_size"),
        max_position=c.whole("max_position_embeddings", "n_positions", default=4096),
        layers=_layers(c, model_type, num_layers, moe),
        tie_word_embeddings=bool(c.get("tie_word_embeddings", default=model_type.startswith("gemma"))),
        gated_mlp=not gptj,
        qkv_bias=attention_bias or qwen2,
        out_bias=attention_bias and model_type in ("gpt_oss", "llama"),
        mlp_bias=bool(c.get("mlp_bias", default=False)) or gptj,
        head_bias=gptj,
        qk_norm=model_type in ("qwen3", "qwen3_moe", "gemma3", "gemma3_text"),
        attention_sinks=model_type == "gpt_oss",
        norms_per_layer=1 if gptj else 4 if model_type in ("gemma2", "gemma3", "gemma3_text") else 2,
        norm_has_bias=gptj,
        mla=_mla(c),
        moe=moe,
        num_vision_params=_vision_params(config, hidden),
        dtype=short_dtype(c.get("dtype", "torch_dtype")),
        native_quant=_native_quant(c, name),
        config=config,
        notes=tuple(notes),
    )


def _mla(c: _Config) -> Mla | None:
    if c.get("kv_lora_rank") is None:
        return None
    return Mla(
        q_lora_rank=c.count("q_lora_rank") or None,
        kv_lora_rank=c.whole("kv_lora_rank"),
        qk_nope_head_dim=c.whole("qk_nope_head_dim"),
        qk_rope_head_dim=c.whole("qk_rope_head_dim"),
        v_head_dim=c.whole("v_head_dim"),
    )


def _moe(c: _Config, model_type: str) -> Moe | None:
    if c.count("n_routed_experts", "num_local_experts", "num_experts") <= 1:
        return None
    experts = c.whole("n_routed_experts", "num_local_experts", "num_experts")
    top_k = c.whole("num_experts_per_tok", "experts_per_token")
    if top_k > experts:
        raise BadInput(f"num_experts_per_tok {top_k} exceeds {experts} experts", where=f"{c.name}: config")
    width = c.whole("moe_intermediate_size", "intermediate_size")
    shared = c.count("shared_expert_intermediate_size") or width * c.count("n_shared_experts")
    if model_type in ("llama4", "llama4_text"):
        shared = width  # one shared expert beside the routed ones, of the same width
    return Moe(
        num_experts=experts,
        experts_per_token=top_k,
        intermediate_size=width,
        shared_intermediate_size=int(shared),
        shared_gate=model_type == "qwen2_moe",
        router_bias=model_type == "gpt_oss" or c.get("topk_method") == "noaux_tc",
        expert_bias=model_type == "gpt_oss",
    )


def _layers(c: _Config, model_type: str, num_layers: int, moe: Moe | None) -> tuple[LayerKind, ...]:
    """Attention and MLP kind of every layer."""
    window = 0 if c.get("use_sliding_window") is False else c.count("sliding_window")
    chunk = c.count("attention_chunk_size")
    types = c.get("layer_types")
    if types is None:
        types = _implied_types(c, model_type, num_layers, window, chunk)
    if not isinstance(types, list) or len(types) != num_layers:
        raise BadInput(f"layer_types: expected one entry for each of {num_layers} layers", where=f"{c.name}: config")
    result = []
    for i, kind in enumerate(types):
        attention = _LAYER_TYPES.get(str(kind))
        if attention is None:
            what = f"layer_types[{i}]: {kind!r} is not covered (known: {', '.join(_LAYER_TYPES)})"
            raise BadInput(what, where=f"{c.name}: config", next_step="measure it instead of predicting it")
        size = {"full": None, "sliding": window, "chunked": chunk}[attention]
        if attention != "full" and not size:
            attention = "full"
        result.append(LayerKind(attention, size, moe is not None and _is_moe_layer(c, i)))
    return tuple(result)


def _implied_types(c: _Config, model_type: str, n: int, window: Any, chunk: Any) -> list[str]:
    """Attention types of families that do not write ``layer_types``."""
    if model_type in ("llama4", "llama4_text") and chunk:
        # Layers without rotary positions attend to everything; by default every fourth one.
        no_rope = c.indices("no_rope_layers")
        interval = c.whole("no_rope_layer_interval", default=4)
        rope = no_rope if len(no_rope) == n else [int((i + 1) % interval != 0) for i in range(n)]
        return ["chunked_attention" if r else "full_attention" for r in rope]
    if model_type == "gpt_oss" or model_type == "gemma2":
        return ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(n)]
    pattern = c.get("sliding_window_pattern")
    if window and isinstance(pattern, int) and pattern > 0:
        return ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(n)]
    return ["sliding_attention" if window else "full_attention"] * n


def _is_moe_layer(c: _Config, i: int) -> bool:
    """Whether layer ``i`` of a mixture-of-experts model holds experts."""
    if c.get("moe_layers") is not None:
        return i in c.indices("moe_layers")
    if i < c.count("first_k_dense_replace") or i in c.indices("mlp_only_layers"):
        return False
    step = c.count("interleave_moe_layer_step", "decoder_sparse_step") or 1
    if (i + 1) % step:
        return False
    return i % (c.count("moe_layer_freq") or 1) == 0


def _native_quant(c: _Config, name: str) -> str | None:
    """The format a checkpoint is stored in, from its ``quantization_config``."""
    q = c.get("quantization_config")
    if not isinstance(q, dict):
        return None
    method = str(q.get("quant_method", "")).lower()
    bits = q.get("bits") or q.get("w_bit")
    if method == "fp8":
        return "fp8_block" if q.get("weight_block_size") else "fp8"
    if method in ("awq", "gptq"):
        return "int4" if bits in (None, 4) else "int8" if bits == 8 else _no_format(method, bits, name)
    if method == "compressed-tensors":
        groups = q.get("config_groups") or {}
        weights = next((g.get("weights") or {} for g in groups.values() if isinstance(g, dict)), {})
        key = (weights.get("num_bits"), weights.get("type"))
        table: dict[tuple[Any, Any], str] = {
            (8, "float"): "fp8",
            (8, "int"): "int8",
            (4, "int"): "int4",
            (4, "float"): "nvfp4",
        }
        return table.get(key) or _no_format(method, key[0], name)
    if method in ("mxfp4", "fbgemm_fp8", "modelopt"):
        return "nvfp4" if method == "modelopt" and "FP4" in str(q.get("quant_algo", "")) else method
    return _no_format(method, bits, name)


def _no_format(method: str, bits: Any, name: str) -> str:
    what = f"quantization_config: method {method!r} with {bits} bits is not covered"
    raise BadInput(what, where=f"{name}: config", next_step="pass --quantization with the nearest known format")


def _vision_params(config: dict[str, Any], hidden: int) -> int:
    """Elements of a Llama 4 vision tower and projector; 0 for text models and (with what is known) other towers."""
    v = config.get("vision_config")
    if not isinstance(v, dict) or config.get("model_type") != "llama4":
        return 0
    c = _Config(v, "vision_config")
    w, inner = c.whole("hidden_size"), c.whole("intermediate_size")
    layer = 4 * (w * w + w) + 2 * w * inner + inner + w + 4 * w  # attention with biases, MLP, two LayerNorms
    patch = c.whole("patch_size")
    patches = (c.whole("image_size") // patch) ** 2
    embed = c.whole("num_channels", default=3) * patch**2 * w + w + (patches + 1) * w  # patches, class, positions
    norms = 4 * w  # before and after the layers
    ratio = c.get("pixel_shuffle_ratio", default=0.5)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0.01 < ratio <= 1:
        raise BadInput(f"vision_config: pixel_shuffle_ratio: expected a share in (0, 1], got {ratio!r}")
    into, out = c.whole("projector_input_dim"), c.whole("projector_output_dim")
    adapter = int(w // ratio**2) * into + into * out
    projector = c.whole("vision_output_dim") * hidden
    return c.whole("num_hidden_layers") * layer + embed + norms + adapter + projector
