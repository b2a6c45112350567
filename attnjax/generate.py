"""python -m attnjax.generate --workdir RUN: text from a trained language model."""

import dataclasses
from pathlib import Path

from attnjax.core.cli import run_main
from attnjax.core.errors import UserError
from attnjax.core.flags import parse_command_line


@dataclasses.dataclass(frozen=True)
class Flags:
    """Generate text from a run.

    Attributes:
        workdir: the run directory.
        prompt: the text to go on from.
        max_new_tokens: most tokens added.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with this probability; 1 keeps all.
        seed: of the draws.
        num: how many samples.
        step: the checkpoint (none: the newest intact one).
        out: a file for the text (none: the terminal).
    """

    workdir: str
    prompt: str = "\n"
    max_new_tokens: int = 200
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    num: int = 1
    step: int | None = None
    out: str | None = None


def main(argv: list[str]) -> None:
    """The command line."""
    flags = parse_command_line(
        argv, Flags, program="attnjax.generate", config=False, overrides=False
    ).flags
    if flags.num < 1 or flags.max_new_tokens < 1:
        raise UserError(
            "attnjax.generate: num and max_new_tokens must be at least 1; got "
            f"num={flags.num}, max_new_tokens={flags.max_new_tokens}."
        )
    from attnjax.decoding.run import load_run, read_config, require_text
    from attnjax.decoding.sampling import Sampler

    require_text(read_config(Path(flags.workdir)), "attnjax.generate")
    sampler = Sampler(flags.temperature, flags.top_k, flags.top_p)
    run = load_run(flags.workdir, step=flags.step)
    texts = run.generate(
        flags.prompt,
        max_new_tokens=flags.max_new_tokens,
        num=flags.num,
        sampler=sampler,
        seed=flags.seed,
    )
    blocks = [flags.prompt + text for text in texts]
    text = blocks[0] if len(blocks) == 1 else _numbered(blocks)
    if flags.out is None:
        print(text)
    else:
        Path(flags.out).write_text(text + "\n")
        print(f"wrote {flags.out}")


def _numbered(blocks: list[str]) -> str:
    return "\n".join(f"--- sample {i + 1}\n{block}" for i, block in enumerate(blocks))


if __name__ == "__main__":
    run_main(main)
