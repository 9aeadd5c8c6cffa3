"""``MTLLM``: a translation encoder, one linear up-projection and a bidirectional LLM, run on packed tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder
from transformers.utils import can_return_tuple

from mtllm_fast.configuration import MTLLMConfig
from mtllm_fast.models import encoding, fusing, loading
from mtllm_fast.models.attention import DEFAULT_ATTENTION, use_default_attention
from mtllm_fast.models.graphs import GraphCache
from mtllm_fast.models.inputs import PackedInputs, prepare_inputs
from mtllm_fast.models.layers import PACKED_LAYER_NAMES, to_packed_layers
from mtllm_fast.models.plain import is_rms_norm
from mtllm_fast.models.stack import enter
from mtllm_fast.models.towers import (
    ATTENTION_BACKENDS,
    final_norm,
    pool,
    rope_frequencies_kept,
    run_encoder,
    run_llm,
    run_other_llm,
)
from mtllm_fast.ops.norm_pool import norm_pool
from mtllm_fast.ops.stack_projection import Composite

logger = logging.getLogger("mtllm_fast")


@dataclass
class MTLLMOutput(BaseModelOutputWithPooling):
    """Output of ``MTLLM``: padded ``[N, L, …]`` for padded inputs (zero at padding), packed ``[T, …]`` for packed ones.

    ``hidden_states``, when asked for: the LLM's states, its input (the up-projected encoder states) first, its normed
    output last. ``encoder_hidden_states``: the encoder's states, embeddings first, before its last LayerNorm.
    """

    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None


class MTLLMPreTrainedModel(loading.CheckpointMixin, PreTrainedModel):
    """What the base model and the heads share: loading, saving, attention choice, placement."""

    config: MTLLMConfig
    config_class = MTLLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = "text"
    supports_gradient_checkpointing = True
    _no_split_modules = PACKED_LAYER_NAMES
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        requested = requested_attention or DEFAULT_ATTENTION
        if requested not in ATTENTION_BACKENDS:
            raise ValueError(
                f"attn_implementation must be one of {', '.join(map(repr, ATTENTION_BACKENDS))}, got {requested!r}"
            )
        return super().get_correct_attn_implementation(requested, is_init_check)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        with rope_frequencies_kept(self):
            return super()._apply(fn, recurse)


class MTLLM(MTLLMPreTrainedModel):
    """An NLLB encoder under a bidirectional LLM: multilingual text in, the LLM's representation space out.

    ``x = W_up · encoder(tokens) (+ b)``, then the LLM's layers on ``x`` without a causal mask, its last RMSNorm, and
    pooling. Paper: "Self-Distillation for Model Stacking Unlocks Cross-Lingual NLU in 200+ Languages",
    arXiv 2406.12739.

    Example:

        >>> from mtllm_fast import MTLLM
        >>> model = MTLLM.from_pretrained("tiny")
        >>> model.encode(["Habari ya dunia", "Wie geht's?"], src_lang=["swh_Latn", "deu_Latn"]).shape
        torch.Size([2, 128])
    """

    _fused: Any = None  # transformers evaluates annotations here

    def __init__(
        self,
        config: MTLLMConfig,
        nllb_encoder: M2M100Encoder | None = None,
        llm2vec: PreTrainedModel | None = None,
    ) -> None:
        use_default_attention(config)
        super().__init__(config)
        self.graphs = GraphCache()
        self.nllb_encoder = nllb_encoder if nllb_encoder is not None else _new_tower(config.nllb_config, M2M100Encoder)
        self.up_proj = nn.Linear(config.nllb_config.d_model, config.hidden_size, bias=bool(config.up_proj_bias))
        self.llm2vec = llm2vec if llm2vec is not None else _new_tower(config.llm2vec_config)
        to_packed_layers(self.nllb_encoder.layers)
        layers = getattr(self.llm2vec, "layers", None)
        self.packed_llm = isinstance(layers, nn.ModuleList) and to_packed_layers(layers)
        if not config.llm_embeddings:
            self.llm2vec.set_input_embeddings(None)
            self._keys_to_ignore_on_load_unexpected = [loading.LLM_EMBEDDINGS.pattern]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.nllb_encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.nllb_encoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> MTLLMOutput:
        """Encode a padded or a packed batch.

        Args:
            input_ids: int64, padded ``[N, L]`` or packed ``[T]``: ``[language code] tokens </s>``.
            attention_mask: ``[N, L]``, 1 at real tokens, padding on the left or on the right. Default: wherever
                ``input_ids`` is not the padding id.
            inputs_embeds: instead of ``input_ids``, states of the encoder, ``[N, L, d]`` or ``[T, d]``, for example
                cached ones: the encoder is skipped and they go to ``up_proj``.
            cu_seqlens: int32 ``[B+1]``: the input is packed, and so is the output.
            max_seqlen: with ``cu_seqlens``, an upper bound of the longest sentence; default T. A tight bound saves
                the GPU from launching blocks that find nothing to do.
            output_hidden_states: also return the states of every layer of both towers.

        Returns:
            MTLLMOutput: ``last_hidden_state`` ``[N, L, D]`` or ``[T, D]``, ``pooler_output`` ``[N, D]`` or ``[B, D]``.

        Raises:
            ValueError: no input or two, a mask with a hole, an id outside the vocabulary, another device, …
                (under ``torch.compile`` and for ids on a GPU, values are not looked at)
            TypeError: ids that are no integers.
        """
        if output_attentions:
            raise ValueError("output_attentions is not supported: packed attention never forms the weights")
        collect = output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        batch = prepare_inputs(self, input_ids, attention_mask, inputs_embeds, cu_seqlens, max_seqlen)
        encoder_states: list[Tensor] | None = [] if collect else None
        llm_states: list[Tensor] | None = [] if collect else None
        encoded = self.encode_tokens(batch, encoder_states)
        hidden, is_normed = self.last_states(encoded, batch, llm_states)
        pooled = self._pool(hidden, is_normed, batch)
        normed = hidden if is_normed else final_norm(self.llm2vec, hidden)
        if llm_states is not None:
            llm_states.append(normed)
        out = batch.unpack
        return MTLLMOutput(
            last_hidden_state=out(normed),
            pooler_output=pooled,
            hidden_states=tuple(map(out, llm_states)) if llm_states is not None else None,
            encoder_last_hidden_state=out(encoded) if collect else None,
            encoder_hidden_states=tuple(map(out, encoder_states)) if encoder_states is not None else None,
        )

    @classmethod
    def from_encoder_and_llm(cls, encoder: Any, llm: Any, **kwargs: Any) -> MTLLM:
        """Join any M2M-100/NLLB encoder and any supported LLM; see ``mtllm_fast.models.joining.join``."""
        from mtllm_fast.models.joining import join

        return join(cls, encoder, llm, **kwargs)

    def encode(
        self,
        sentences: str | Sequence[str],
        src_lang: str | Sequence[str],
        batch_size: int = 32,
        *,
        max_length: int = 512,
        batch_tokens: int | None = None,
        normalize_embeddings: bool = False,
        convert_to_numpy: bool = False,
        output: str = "pooled",
        output_dtype: torch.dtype | None = None,
        show_progress_bar: bool | None = None,
        device: str | torch.device | None = None,
        cuda_graphs: bool | None = None,
    ) -> Any:
        """Embed texts of any of NLLB's languages, one language for all or one per text.

        Texts are batched by tokens with others of their length and come back in the input's order. An embedding does
        not depend on what it was batched with. Thread-safe in evaluation mode: the tokenizer's ``src_lang``
        is never set. A model in training mode is evaluated without dropout, and is in training mode again afterwards.

        Args:
            sentences: one text or several; ``""`` is a text.
            src_lang: FLORES-200 code such as ``"swh_Latn"`` (or an alias, see ``mtllm_fast.languages``).
            batch_size: sets the default of ``batch_tokens``.
            max_length: tokens per text, language code and ``</s>`` included; longer texts are truncated, with one
                warning that counts them.
            batch_tokens: tokens per batch; default ``batch_size * max_length``, what a padded batch of
                ``batch_size`` texts may take, and at most 2048 on a CPU, whose caches larger batches leave.
            normalize_embeddings: scale to unit length (computed in float32).
            convert_to_numpy: return NumPy (float32 for a bfloat16 model) on the host instead of tensors.
            output: ``"pooled"``: ``[N, D]``; ``"tokens"``: a list of ``[L_i, D]``, the states of each text's tokens.
            output_dtype: default: the model's.
            show_progress_bar: default: for long work on a terminal.
            device: move the model there first.
            cuda_graphs: batches of up to 1024 tokens run as CUDA graphs, rounded up to a few sizes, each captured once:
                None: on a GPU where nothing forbids it, a size from its second batch on; True: from the first on, and
                raise where graphs cannot serve; False: never. Change a module's constants (eps …) and
                ``release_graphs()``; changes of weights, adapters and attention are noticed.

        Returns:
            Tensor | numpy.ndarray | list: as above; without the first axis when ``sentences`` is one string.

        Raises:
            UnknownLanguageError: names the nearest codes.
            TokenizerNotFoundError: neither beside the checkpoint nor at the configured id.
            ValueError: an option is out of range, or ``cuda_graphs=True`` cannot be served (the reason is named).

        Example:

            >>> from mtllm_fast import MTLLM
            >>> model = MTLLM.from_pretrained("tiny")
            >>> model.encode("Habari ya dunia", "swh_Latn", normalize_embeddings=True).norm().round().item()
            1.0
        """
        if output not in encoding.OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(map(repr, encoding.OUTPUTS))}, got {output!r}")
        for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not isinstance(max_length, int):
            raise TypeError(f"max_length must be an int, got {type(max_length).__name__}")
        if output_dtype is not None and not isinstance(output_dtype, torch.dtype):
            raise TypeError(f"output_dtype must be a torch.dtype, got {type(output_dtype).__name__} {output_dtype!r}")
        if cuda_graphs is not None and not isinstance(cuda_graphs, bool):
            raise TypeError(f"cuda_graphs must be None, True or False, got {cuda_graphs!r}")
        if device is not None:
            self.to(device)
        options = encoding.EncodeOptions(
            max_length=max_length,
            batch_tokens=batch_tokens or encoding.default_batch_tokens(self.device, batch_size, max_length),
            normalize=normalize_embeddings,
            output=output,
            dtype=output_dtype,
            to_numpy=convert_to_numpy,
            cuda_graphs=cuda_graphs,
        )
        return encoding.encode(self, sentences, src_lang, options, show_progress_bar)

    def fuse(self, precision: str | None = None) -> fusing.FuseReport:
        """Absorb the up-projection into the first layer's q, k and v, for inference: 2.8 times fewer FLOPs there at 8B.

        The composite is rebuilt by itself when a weight that it was made from has changed, and dropped when the model
        is trained, cast, moved, loaded into, or asked for gradients or another precision (autocast). Exact in float32.
        In half precision it is compared with float64 on states of the encoder as it is now; a form that errs more than
        the modules do gives way to the next safer one. On a GPU q, k and v, gate and up of the other layers are laid
        side by side in memory, so that one product computes them, and the replaced q, k and v of the first layer go to
        the host (they stay parameters and are saved) until ``unfuse()``. Edits through ``.data`` of a tensor on a GPU
        are seen by ``encode``, not by a bare forward; of those that went to the host a sample of values is compared; a
        compiled graph checks nothing: fuse again after such edits.

        With a ``precision`` the LLM's other linear layers multiply in 8 bits, weights scaled per output channel and
        activations per token; the encoder, the up-projection, norms, attention and pooling keep the model's dtype.
        What it costs in accuracy depends on the model: ``mtllm-fast evaluate --precision-report`` measures it. Of an
        edit through ``.data`` of one of these weights, a sample of its values is compared.

        Args:
            precision: ``"fp8"``: e4m3 by ``torch._scaled_mm``, of a bfloat16 model on a GPU of compute capability 8.9
                or newer; the weights go to the host like those of the first stage. ``"int8"``: by oneDNN on a CPU,
                beside the weights. ``"fp8-emulated"``: fp8's numbers on any device, slowly. Layers that are no plain
                ``nn.Linear`` (PEFT's, hooked, sharded) are left as they are, and counted.

        Returns:
            FuseReport: the form taken, and the errors that decided.

        Raises:
            ValueError: the stage is no plain weights (quantised, sharded, hooked, another LLM family), or the
                precision is unknown or not to be had here.

        Example:

            >>> from mtllm_fast import MTLLM
            >>> model = MTLLM.from_pretrained("tiny")
            >>> model.fuse().form
            'absorbed'
            >>> model.fuse(precision="fp8-emulated").quantised
            18
        """
        self.unfuse()
        self._fused = fusing.fuse(self, precision)
        return self._fused.report

    def unfuse(self) -> None:
        """Back to the modules; does nothing on a model that is not fused."""
        self.release_graphs()
        if self._fused is not None:
            fused, self._fused = self._fused, None
            fusing.unfuse(self, fused)

    def release_graphs(self) -> None:
        """Free the CUDA graphs that ``encode`` has captured and their memory; it captures again when it needs to."""
        self.graphs.release()

    def composite(self, encoded_Td: Tensor) -> Composite | None:
        """The fused stage's weights, never stale; None where the modules must run."""
        if self._fused is None:
            return None
        needs = fusing.why_not_usable(self, self._fused, encoded_Td)
        if torch.compiler.is_compiling():
            if needs and encoded_Td.is_cuda:  # weights that the modules would need are on the host
                raise RuntimeError("a compiled model that is fused serves inference alone: unfuse() it first")
            return None if needs else self._fused.composite
        if needs:
            logger.warning("a fused model was asked for %s: it is unfused; fuse() again for inference", needs)
            self.unfuse()
        self.refresh_fused()
        return None if self._fused is None else self._fused.composite

    def refresh_fused(self, thorough: bool = False) -> None:
        """Fuse again if a weight has changed; ``thorough`` waits for the device to compare its memory."""
        if self._fused is not None and not fusing.is_fresh(self, self._fused, thorough):
            precision = self._fused.report.precision
            self.unfuse()
            reason = fusing.why_not(self, precision)
            if reason is None:
                self.fuse(precision)
            else:
                logger.warning("a fused model is unfused: %s", reason)

    def train(self, mode: bool = True) -> Any:
        if mode:
            self.unfuse()
        return super().train(mode)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.unfuse()
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.unfuse()
        return super()._apply(fn, recurse)

    def encode_packed(self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None) -> Tensor:
        """Pooled embeddings only, no ``[T, D]`` output: ids ``[T]``, ``cu_seqlens`` ``[B+1]`` -> ``[B, D]``."""
        return self.pooled(prepare_inputs(self, input_ids, None, None, cu_seqlens, max_seqlen))

    def pooled(self, batch: PackedInputs) -> Tensor:
        """Pooled embeddings ``[B, D]`` of prepared inputs."""
        hidden, is_normed = self.last_states(self.encode_tokens(batch), batch)
        return self._pool(hidden, is_normed, batch)

    def hidden(self, batch: PackedInputs) -> Tensor:
        """Last hidden states ``[T, D]`` of prepared inputs, packed."""
        hidden, is_normed = self.last_states(self.encode_tokens(batch), batch)
        return hidden if is_normed else final_norm(self.llm2vec, hidden)

    def encode_tokens(self, batch: PackedInputs, collect: list[Tensor] | None = None) -> Tensor:
        if batch.encoder_states is not None:
            return batch.encoder_states
        return run_encoder(self.nllb_encoder, batch.input_ids, batch.layout, collect)

    def last_states(
        self, encoded_Td: Tensor, batch: PackedInputs, collect: list[Tensor] | None = None
    ) -> tuple[Tensor, bool]:
        """The LLM's last states and whether its last norm is applied to them already."""
        if not self.packed_llm:
            return run_other_llm(self.llm2vec, self.up_proj(encoded_Td), batch.layout, collect), True
        entry = enter(self, encoded_Td, batch.layout)
        return run_llm(self.llm2vec, entry.x, batch.layout, collect, first_qkv=entry.qkv, rope=entry.rope), False

    def _pool(self, hidden_TD: Tensor, is_normed: bool, batch: PackedInputs) -> Tensor:
        pooling = self.config.pooling
        cu_seqlens = batch.layout.cu_seqlens.to(hidden_TD.device)  # of a model over several devices, the last one's
        if is_normed:
            return pool(hidden_TD, cu_seqlens, pooling)
        norm = self.llm2vec.norm
        if not is_rms_norm(norm):
            return pool(norm(hidden_TD), cu_seqlens, pooling)
        return norm_pool(hidden_TD, norm.weight, cu_seqlens, eps=norm.variance_epsilon, pooling=pooling)


def _new_tower(config: PreTrainedConfig, tower_class: Any = None) -> PreTrainedModel:
    """A randomly initialised tower in the default dtype (its sub-config's own dtype has no say in a stack)."""
    if tower_class is None:
        tower_class = AutoModel._model_mapping[type(config)]
    return tower_class(config)
