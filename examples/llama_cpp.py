"""Decode what `unmask export --format gguf` wrote, with llama.cpp alone: by tokens, by blocks, and with a drafter.

    bash tests/libllama/fetch.sh ~/.cache/libllama        # or any build of llama.cpp v0.5.0
    python examples/llama_cpp.py ~/.cache/libllama out/model.gguf "Once upon a time" [out/drafter.gguf]

Needs numpy and cffi. The loops are `autoregressive`, `blocks` and `speculative`; the rest calls libllama.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from cffi import FFI

DECLARATIONS = """
typedef struct llama_batch { int32_t n_tokens; int32_t *token; float *embd; int32_t *pos; int32_t *n_seq_id;
  int32_t **seq_id; int8_t *logits; } llama_batch;
struct llama_model_params { void *devices; void *overrides; int32_t n_gpu_layers; int split_mode; int load_mode;
  int lazy_mode; int32_t main_gpu; float *tensor_split; void *progress; void *progress_data; void *kv_overrides;
  bool vocab_only; bool check_tensors; bool use_extra_bufts; bool no_host; bool no_alloc; bool load_mtp; };
struct llama_context_params { uint32_t n_ctx; uint32_t n_batch; uint32_t n_ubatch; uint32_t n_seq_max;
  uint32_t n_rs_seq; uint32_t n_outputs_max; uint32_t n_outputs_max_per_seq; int32_t n_threads;
  int32_t n_threads_batch; int ctx_type; int rope_scaling_type; int pooling_type; int attention_type;
  int flash_attn_type; float rope_freq_base; float rope_freq_scale; float yarn_ext_factor; float yarn_attn_factor;
  float yarn_beta_fast; float yarn_beta_slow; uint32_t yarn_orig_ctx; float defrag_thold; void *cb_eval;
  void *cb_eval_data; int type_k; int type_v; size_t moe_cache_size; void *abort_callback; void *abort_data;
  bool embeddings; bool offload_kqv; bool no_perf; bool op_offload; bool swa_full; bool kv_unified; void *samplers;
  size_t n_samplers; void *ctx_other; };
void llama_backend_init(void);
void llama_log_set(void (*callback)(int, const char *, void *), void *data);
struct llama_model_params llama_model_default_params(void);
struct llama_context_params llama_context_default_params(void);
void *llama_model_load_from_file(const char *path, struct llama_model_params params);
void *llama_init_from_model(void *model, struct llama_context_params params);
void llama_model_free(void *model);
void llama_free(void *context);
const void *llama_model_get_vocab(const void *model);
int32_t llama_vocab_n_tokens(const void *vocab);
int32_t llama_model_meta_val_str(const void *model, const char *key, char *buffer, size_t size);
int32_t llama_tokenize(const void *vocab, const char *text, int32_t length, int32_t *tokens, int32_t most,
  bool add_special, bool parse_special);
int32_t llama_detokenize(const void *vocab, const int32_t *tokens, int32_t count, char *text, int32_t most,
  bool remove_special, bool unparse_special);
void *llama_adapter_lora_init(void *model, const char *path);
int32_t llama_set_adapters_lora(void *context, void **adapters, size_t count, float *scales);
void llama_set_causal_attn(void *context, bool causal);
void *llama_get_memory(const void *context);
bool llama_memory_seq_rm(void *memory, int32_t sequence, int32_t from, int32_t to);
llama_batch llama_batch_init(int32_t tokens, int32_t embd, int32_t sequences);
void llama_batch_free(llama_batch batch);
int32_t llama_decode(void *context, llama_batch batch);
float *llama_get_logits(void *context);
bool llama_model_is_diffusion(const void *model);
const int32_t *llama_vocab_get_suppress_tokens(const void *vocab, int32_t *count);
"""
F32, NO_FLASH, ONE_SEQUENCE = 0, 0, 1


@cache
def _library(folder: Path) -> tuple[Any, Any, list[str], Any]:
    """libllama, once for all models: its interface, its functions, what it said, and what keeps listening to it."""
    said: list[str] = []
    ffi, ggml = FFI(), FFI()
    ffi.cdef(DECLARATIONS)
    ggml.cdef("void ggml_backend_load_all_from_path(const char *path);")
    c = ffi.dlopen(str(next(folder.glob("libllama.*so*"))))

    @ffi.callback("void(int, const char *, void *)")
    def heard(_level: int, text: Any, _data: Any) -> None:
        said.append(ffi.string(text).decode(errors="replace").strip())

    c.llama_log_set(heard, ffi.NULL)
    ggml.dlopen(str(next(folder.glob("libggml.*so*")))).ggml_backend_load_all_from_path(str(folder).encode())
    c.llama_backend_init()
    return ffi, c, said, heard


class Llama:
    """A GGUF file in libllama: one sequence, whose keys and values are float32. context 0: its tokenizer alone."""

    def __init__(self, library: Path, file: Path, adapter: Path | None = None, *, context: int = 512) -> None:
        self.ffi, self.c, self.said, _ = _library(library)
        how = self.c.llama_model_default_params()
        how.vocab_only = context == 0
        self.model = self.c.llama_model_load_from_file(str(file).encode(), how)
        if not self.model:
            raise ValueError(f"libllama cannot load {str(file)!r}: {' '.join(self.said[-3:])}")
        self.vocabulary = self.c.llama_model_get_vocab(self.model)
        self.size = self.c.llama_vocab_n_tokens(self.vocabulary)
        self.context = None
        if context:
            self._open(file, adapter, context)

    def _open(self, file: Path, adapter: Path | None, context: int) -> None:
        options = self.c.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = context
        options.type_k = options.type_v = F32
        options.flash_attn_type, options.n_seq_max, options.swa_full = NO_FLASH, ONE_SEQUENCE, True
        options.n_threads = options.n_threads_batch = 1
        self.context = self.c.llama_init_from_model(self.model, options)
        if not self.context:
            raise ValueError(f"libllama cannot run {str(file)!r}: {' '.join(self.said[-3:])}")
        self.batch = self.c.llama_batch_init(context, 0, 1)
        self.adapter = adapter and self.c.llama_adapter_lora_init(self.model, str(adapter).encode())
        if adapter and not self.adapter:
            raise ValueError(f"libllama cannot load {str(adapter)!r}: {' '.join(self.said[-3:])}")

    def close(self) -> None:
        if self.context:
            self.c.llama_batch_free(self.batch)
            self.c.llama_free(self.context)
        self.c.llama_model_free(self.model)

    def meta(self, key: str) -> str | None:
        """The value of a key of the file, as text."""
        text = self.ffi.new("char[]", 256)
        return (
            self.ffi.string(text).decode()
            if self.c.llama_model_meta_val_str(self.model, key.encode(), text, 256) >= 0
            else None
        )

    def suppressed(self) -> list[int]:
        """Tokens that no sampler may choose, of the file: masks."""
        count = self.ffi.new("int32_t *")
        found = self.c.llama_vocab_get_suppress_tokens(self.vocabulary, count)
        return [found[i] for i in range(count[0])]

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """The tokens of a text, with what the tokenizer adds; special: text that spells a special token is one."""
        raw = text.encode()
        tokens = self.ffi.new("int32_t[]", len(raw) + 8)
        count = self.c.llama_tokenize(self.vocabulary, raw, len(raw), tokens, len(raw) + 8, True, special)
        return list(tokens[0:count])

    def text(self, tokens: Sequence[int]) -> str:
        most = 64 * len(tokens) + 64
        out = self.ffi.new("char[]", most)
        given = self.ffi.new("int32_t[]", list(tokens))
        count = self.c.llama_detokenize(self.vocabulary, given, len(tokens), out, most, False, False)
        return self.ffi.buffer(out, count)[:].decode(errors="replace")

    def places(self, seed: int, count: int) -> list[int]:
        """What a drafter reads where `count` tokens will be, but for the first: masks, or random tokens."""
        shift = self.meta("diffusion.shift_logits") == "true"
        masks = count - 1 + int(not (shift and self.meta("diffusion.noisy_attention") == "causal"))
        noise, rows = (int(self.meta(f"diffusion.{name}") or 0) for name in ("noise_tokens", "mask_rows"))
        if noise:
            return [int(token) for token in np.random.default_rng(seed).integers(0, noise, masks)]
        return [int(self.meta("tokenizer.ggml.mask_token_id") or 0) + min(1 + i, rows - 1) for i in range(masks)]

    def forward(self, tokens: Sequence[int], start: int, *, causal: bool = True, adapted: bool = False) -> np.ndarray:
        """Logits (tokens, vocabulary) on top of the first `start` cached tokens, after which these are cached."""
        c, batch = self.c, self.batch
        c.llama_memory_seq_rm(c.llama_get_memory(self.context), 0, start, -1)
        c.llama_set_causal_attn(self.context, causal)
        if self.adapter:
            c.llama_set_adapters_lora(self.context, self.ffi.new("void *[]", [self.adapter]), int(adapted),
                                      self.ffi.new("float[]", [1.0]))  # fmt: skip
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
            batch.logits[i] = True
        code = c.llama_decode(self.context, batch)
        if code:
            raise ValueError(f"llama_decode says {code}: {' '.join(self.said[-3:])}")
        size = 4 * len(tokens) * self.size
        logits = np.frombuffer(self.ffi.buffer(c.llama_get_logits(self.context), size), np.float32)
        logits = logits.reshape(len(tokens), self.size).copy()
        logits[:, self.suppressed()] = -np.inf
        return logits


def autoregressive(llama: Llama, prompt: Sequence[int], new: int, ends: Sequence[int] = ()) -> list[int]:
    """Greedy decoding, one token a forward."""
    text = list(prompt)
    llama.forward(text[:-1], 0) if len(text) > 1 else None
    while len(text) < len(prompt) + new and not (len(text) > len(prompt) and text[-1] in ends):
        text.append(int(llama.forward(text[-1:], len(text) - 1)[0].argmax()))
    return text[len(prompt) :]


def blocks(
    llama: Llama, prompt: Sequence[int], new: int, ends: Sequence[int] = (), threshold: float = 0.9
) -> list[int]:
    """Block diffusion at temperature 0: a forward commits what is more probable than `threshold`, and the best one."""
    size, mask = int(llama.meta("diffusion.block_size") or 0), int(llama.meta("tokenizer.ggml.mask_token_id") or 0)
    shift = llama.meta("diffusion.shift_logits") == "true"
    clean = llama.meta("diffusion.clean_attention") == "causal"
    noisy = llama.meta("diffusion.noisy_attention") == "causal"
    text, end, before = list(prompt), len(prompt) + new, None
    kept = len(prompt) // size * size
    for start in range(0, kept, size):  # a block of clean text sees itself and those before it
        before = llama.forward(text[start : start + size], start, causal=clean)[-1:]
    while kept < end and not set(text[len(prompt) :]) & set(ends):
        block = text[kept:] + [mask] * (size - len(text[kept:]))
        while waiting := [i for i, token in enumerate(block) if token == mask and kept + i < end]:
            logits = llama.forward(block, kept, causal=noisy).astype(float)
            if shift:  # row i - 1 scores position i, and the last row of clean text the first one of the block
                logits = np.concatenate([logits[:1] if before is None else before, logits[:-1]])
            best, top = logits.argmax(-1), logits.max(-1)
            confidence = 1 / np.exp(logits - top[:, None]).sum(-1)
            surest = max(waiting, key=lambda i: (confidence[i], -i))
            for i in waiting:
                if confidence[i] > threshold or i == surest:
                    block[i] = int(best[i])
        text = text[:kept] + block
        before = llama.forward(block, kept, causal=clean)[-1:]
        kept += size
    return _cut(text[len(prompt) : end], ends)


def draft(llama: Llama, text: Sequence[int], count: int) -> np.ndarray:
    """Logits (count, vocabulary) of the tokens after `text`, whose last one is not cached: one forward, adapter on."""
    shift = llama.meta("diffusion.shift_logits") == "true"
    noisy = llama.meta("diffusion.noisy_attention") == "causal"
    logits = llama.forward([text[-1], *llama.places(len(text), count)], len(text) - 1, causal=noisy, adapted=True)
    return logits[int(not shift) :][:count]


def speculative(llama: Llama, prompt: Sequence[int], new: int, ends: Sequence[int] = ()) -> tuple[list[int], int]:
    """The tokens of `autoregressive`, and the forwards that they took: the adapter drafts, the model verifies."""
    size, text, forwards, end = int(llama.meta("diffusion.block_size") or 0), list(prompt), 0, len(prompt) + new
    llama.forward(text[:-1], 0) if len(text) > 1 else None
    while len(text) < end and not set(text[len(prompt) :]) & set(ends):
        drafts = draft(llama, text, size - 1).argmax(-1).tolist()
        said = llama.forward([text[-1], *drafts], len(text) - 1).argmax(-1).tolist()
        right = next((i for i, (a, b) in enumerate(zip(drafts, said, strict=False)) if a != b), len(drafts))
        text += [*drafts[:right], said[right]]
        forwards += 2
    return _cut(text[len(prompt) : end], ends), forwards


def _cut(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens up to and with the first end token."""
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]


if __name__ == "__main__":
    library, file, prompt, *adapter = sys.argv[1:]
    llama = Llama(Path(library).expanduser(), Path(file), Path(adapter[0]) if adapter else None)
    ids = llama.tokenize(prompt)
    if adapter:
        tokens, forwards = speculative(llama, ids, 64)
        print(llama.text(tokens), f"\n({len(tokens) / forwards:.2f} tokens a forward)")
    else:
        print(llama.text((blocks if llama.meta("diffusion.block_size") else autoregressive)(llama, ids, 64)))
