"""Text for language models."""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from attnjax import data
from attnjax.core import schema
from attnjax.core.errors import UserError
from attnjax.data import tokenizers
from attnjax.data.statistics import ngram_entropy
from attnjax.data.tokenizers.base import Building
from attnjax.data.tokenizers.registry import make_tokenizer
from attnjax.models import lm
from attnjax.tasks import language_modelling
from attnjax.training import sequence, sharding
from attnjax.training.feeds.base import Batch, Feed, Reference, check_at_least

TOKENIZER = "tokenizer.json"
# The key of summary.json for `decode_state_per_token`; None without a decode form.
DECODE_STATE = "decode_state_bytes_per_token"

_ARRAYS = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "segment_ids": jnp.int32,
    "positions": jnp.int32,
    "weights": jnp.float32,
}


class TextFeed(Feed):
    """Rows of tokens for `models.lm` and `tasks.language_modelling`."""

    model_module = lm
    task_module = language_modelling
    unit = "token"
    default_source = "stdlib"

    data_class = staticmethod(data.config_class)

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """See `Feed`."""
        check_at_least(config, ("train", "sample_tokens", 0), ("data", "seq_len", 1))
        model, length = config["model"], config["data"]["seq_len"]
        if model["positions"] == "learned" and length > model["max_len"]:
            raise UserError(
                "config.data.seq_len: must not exceed config.model.max_len with "
                f"learned positions; got seq_len={length}, max_len="
                f"{model['max_len']}. Raise max_len, or use positions=rope."
            )
        rows, opened = (config["eval"][name] for name in ("explain", "explain_len"))
        if rows and opened > length:
            raise UserError(
                "config.eval.explain_len: must not exceed config.data.seq_len; got "
                f"explain_len={opened}, seq_len={length}. Lower it (at least 2), or "
                "set config.eval.explain=0."
            )
        prefix = config["task"]["prefix_len"]
        if not 0 <= prefix < length:
            raise UserError(
                "config.task.prefix_len: must be in [0, config.data.seq_len); got "
                f"{prefix}, seq_len={length}."
            )
        kind = model["prefix"]["kind"]
        if prefix and kind != "none":
            raise UserError(
                "config.task.prefix_len: a prefix that sees both ways would show text "
                f"to the learned tokens in front of it; got prefix_len={prefix}, "
                f"config.model.prefix.kind={kind}. Use one or the other."
            )

    @property
    def units_per_row(self) -> int:
        """T."""
        return self.data.seq_len

    def row_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `Feed`."""
        shape = (self.data.seq_len,)
        return {name: jax.ShapeDtypeStruct(shape, d) for name, d in _ARRAYS.items()}

    @property
    def about(self) -> dict[str, Any]:
        """See `Feed`."""
        return {"data": self.data.name, "seq_len": self.data.seq_len}

    # ---- the model and the task

    def sizes(self) -> dict[str, int]:
        """{"vocab_size": the tokenizer's}."""
        return {"vocab_size": self.corpus.tokenizer.vocab_size}

    def planned_sizes(self) -> dict[str, int]:
        """`sizes`, from the tokenizer's name where that says it."""
        source = self.config["data"]
        kind, _, argument = str(source.get("tokenizer", "")).partition(":")
        if kind == "bytes":
            return {"vocab_size": 256}
        if kind in ("bpe", "ids") and argument.isdecimal():
            return {"vocab_size": int(argument)}
        if kind == "json":
            building = Building(eos_token=source.get("eos_token"))
            tokenizer = make_tokenizer(source["tokenizer"], building)
            return {"vocab_size": tokenizer.vocab_size}
        return self.sizes()

    @staticmethod
    def sizes_of(model: Any) -> dict[str, int]:
        """See `Feed`."""
        return {"vocab_size": model.vocab_size}

    @classmethod
    def make_model(
        cls, config: Mapping[str, Any], sizes: Mapping[str, int], *, platform, target
    ) -> lm.LM:
        """See `Feed`."""
        return lm.LM(
            schema.build(lm.Config, config["model"]),
            sizes["vocab_size"],
            platform=platform,
            target=target,
        )

    def make_task(self, model: Any, mesh=None, *, sequence_form=None):
        """See `Feed`."""
        source = self.config["data"]
        use_segments = source.get("packing") == "packed" and source.get("isolate", True)
        if use_segments:
            model.check_packed()
        return language_modelling.LanguageModelling(
            self.task_config,
            model,
            use_segments=use_segments,
            rows=self.batch_rows(mesh),
            sequence_form=sequence_form,
        )

    def sequence_form(self, model: Any, mesh) -> str | None:
        """See `Feed`."""
        return sequence.choose_form(
            self.config["mesh"]["sequence_form"],
            make_task=lambda form: self.make_task(model, mesh, sequence_form=form),
            length=self.data.seq_len,
            mesh=mesh,
        )

    def row_flops(self, model: Any) -> float:
        """See `Feed`."""
        return model.flops(self.data.seq_len)

    def search_facts(self, model: Any) -> dict[str, int]:
        """See `Feed`."""
        vocab = model.vocab_size
        at_once = language_modelling.LOGITS_AT_ONCE // vocab
        return {
            "seq_len": self.data.seq_len,
            "vocab": vocab,
            "tables": 1 if model.config.tie_embeddings else 2,
            "loss_tokens": self.config["task"].get("loss_chunk") or at_once,
        }

    # ---- the data

    @cached_property
    def corpus(self) -> data.Corpus:
        """The tokenised text."""
        return data.open_corpus(self.data)

    @property
    def description(self) -> str:
        """See `Feed`."""
        return (
            f"{self.corpus.train.num_tokens:,} training and "
            f"{self.corpus.eval.num_tokens:,} held-out tokens of {self.data.name}"
        )

    def batch(self, *, seed, step, batch_size, rows=None) -> Batch:
        """See `Feed`."""
        return data.batch(
            self.corpus.train,
            seed=seed,
            step=step,
            batch_size=batch_size,
            seq_len=self.data.seq_len,
            mode=self.data.packing,
            isolate=self.data.isolate,
            rows=rows,
        )

    def eval_batches(self, *, batch_size, rows=None) -> Iterator[Batch]:
        """See `Feed`."""
        return data.eval_batches(
            self.corpus.eval,
            batch_size=batch_size,
            seq_len=self.data.seq_len,
            mode=self.data.packing,
            isolate=self.data.isolate,
            rows=rows,
        )

    def placed(self, batch: Batch, mesh, sequence_form: str | None) -> Batch:
        """The tokens [B, T] in the order in which they lie on the devices, and of
        them those of this host."""
        batch = sequence.lay_out(batch, sequence_form, mesh)
        tokens = sharding.host_tokens_of(mesh, self.data.seq_len)
        return {name: value[:, tokens] for name, value in batch.items()}

    # ---- what a run keeps and says of it

    def save(self, path: Path) -> None:
        """The tokenizer."""
        tokenizers.save_tokenizer(self.corpus.tokenizer, path / TOKENIZER)

    def check_source(self, path: Path) -> None:
        """See `Feed`: the tokenizers must be the same."""
        stored = tokenizers.load_tokenizer(path / TOKENIZER)
        tokenizers.check_same_tokenizer(
            stored, self.corpus.tokenizer, owner="config.train.init_from"
        )

    def check_run(self, path: Path) -> None:
        """See `Feed`: the tokenizers must be the same."""
        stored = tokenizers.load_tokenizer(path / TOKENIZER)
        tokenizers.check_same_tokenizer(stored, self.corpus.tokenizer, owner="evaluate")

    @cached_property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of held-out text per predicted token, None where unknown."""
        split = self.corpus.eval
        count = data.num_predicted(split, mode=self.data.packing)
        if split.num_bytes is None or count == 0:
            return None
        return split.num_bytes / count

    @property
    def summary_facts(self) -> dict[str, Any]:
        """See `Feed`."""
        return {"bytes_per_token": self.bytes_per_token}

    def reference(self) -> Reference:
        """What a model without attention knows."""
        corpus = self.corpus
        entropy = ngram_entropy(
            corpus.train, corpus.eval, corpus.tokenizer, mode=self.data.packing
        )
        found = dataclasses.asdict(entropy)
        return Reference(
            levels={f"{name} entropy": found[name] for name in ("unigram", "bigram")},
            summary={f"{name}_entropy": found[name] for name in ("unigram", "bigram")},
            bytes_per_unit=entropy.bytes_per_token,
        )

    def more_summary(self, model: Any) -> dict[str, Any]:
        """The size of the decode state."""
        try:
            size = decode_state_per_token(model, self.data.seq_len)
        except UserError:
            size = None
        return {DECODE_STATE: size}


def decode_state_per_token(model: Any, length: int) -> float:
    """Bytes of decode state a token of one sequence of `length`, over all layers.

    Raises:
        UserError: the model has no decode form; says which part has none.
    """

    def state():
        arrays = model.unstack(*model.init(0))
        return model.init_state(arrays, 1, length)

    leaves = jax.tree.leaves(jax.eval_shape(state))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / length
