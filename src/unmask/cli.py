"""The command line. Torch is imported inside the commands, so that --help stays fast.

Exit code 0 on success, 2 on bad input with one line on stderr. With --json a command prints exactly one JSON
object on stdout; progress and logs go to stderr.
"""

from __future__ import annotations

import json
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.version import __version__

app = typer.Typer(
    help="Turn any pretrained autoregressive language model into a diffusion language model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Data = Annotated[
    list[str],
    typer.Option("--data", help="A .txt, .jsonl or .parquet file, a folder of them, or a hub id; can be repeated."),
]


def _version(show: bool) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command(
    epilog="Example: unmask adapt Qwen/Qwen3-0.6B-Base --data corpus.jsonl --output runs/q --max-tokens 50000000 "
    "block_size=16 mixed_precision=bf16"
)
def adapt(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a causal language model.")],
    data: Data,
    output: Annotated[Path, typer.Option(help="Folder of the run: checkpoints, metrics, final model.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="SETTING=VALUE of the recipe (see `unmask recipes NAME`).")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Name of a recipe (see `unmask recipes`); by default a converted model's own, else efficient-dlm."
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Clean, unpadded training tokens; without it, one pass over the data.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue the run in the output folder.")] = False,
    as_json: Json = False,
) -> None:
    """Convert a model by training it on text."""
    more, chosen = _split_settings(settings or [])
    if max_tokens is not None:
        chosen["max_tokens"] = max_tokens

    import unmask

    unmask.adapt(model, [*data, *more], recipe, output, resume=resume, **chosen)
    run = json.loads((output / "run.json").read_text())
    if as_json:
        print(
            json.dumps(
                {"output": str(output), "tokens": run["tokens"], **run["evaluation"], "settings": run["settings"]}
            )
        )
        return
    for name, value in run["evaluation"].items():
        print(f"held-out {name}: {value:.4f} nats per predicted token", file=sys.stderr)
    print(f"saved to {output}")


@app.command(epilog='Example: unmask generate runs/q "Once upon a time" --max-new-tokens 64 --confidence-threshold 0.8')
def generate(
    model: Annotated[str, typer.Argument(help="Folder or hub id.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    mode: Annotated[
        str | None, typer.Option(help="diffusion, ar or speculative; by default what the checkpoint is.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 128,
    block_size: Annotated[int | None, typer.Option(help="Decode in blocks of another size.")] = None,
    max_denoising_steps: Annotated[int | None, typer.Option(help="Forwards per block at most.")] = None,
    confidence_threshold: Annotated[
        float | None, typer.Option(help="Commit tokens of higher probability: 1 is one a forward, 0 a block.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Masked positions of a block that a forward sees; faster, and worse.")
    ] = None,
    draft_length: Annotated[
        str | None, typer.Option(help="Positions drafted at a time in speculative mode, or auto.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the smallest set of tokens with this mass.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from so many tokens at most.")] = None,
    guidance_scale: Annotated[float, typer.Option(help="Of classifier-free guidance; 1 is none.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End where this text appears; can be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Write a page (.html) that replays how the text was denoised.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show on the terminal how the text is denoised, coloured by confidence.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt."""
    if watch and as_json:
        raise ValueError("--watch draws where --json prints: leave one of them out")
    if replay is not None and (replay.is_dir() or not replay.parent.is_dir()):
        raise ValueError(f"--replay {str(replay)!r} is no file in a folder that exists: name one such as replay.html")
    text = sys.stdin.read() if prompt == "-" else prompt
    drafted: int | str | None = draft_length
    if draft_length is not None and draft_length.lstrip("-").isdigit():
        drafted = int(draft_length)

    import unmask
    from unmask.replay import watching, write_replay
    from unmask.sampling import Threshold, Trace

    select = None if confidence_threshold is None else Threshold(confidence_threshold)
    lm = unmask.load(model)
    given = lm._prompt_ids(text, None)[0].tolist()
    live = _Stream(lm, text) if sys.stdout.isatty() and not (as_json or stop or watch) else None
    with watching(lm.tokenizer, given, text, show=watch and sys.stdout.isatty()) as watcher:
        trace = Trace(select, watcher, live) if watcher is not None or replay is not None else None
        out = lm.generate(
            text,
            mode=mode,
            max_new_tokens=max_new_tokens,
            block_size=block_size,
            max_denoising_steps=max_denoising_steps,
            select=select if trace is None else trace.select,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            guidance_scale=guidance_scale,
            stop_strings=stop,
            window=window,
            seed=seed,
            callback=live if trace is None else trace.callback,
            draft_length=drafted,
        )
        new = out.sequences[0, len(given) : len(given) + int(out.num_new_tokens[0])].tolist()
        if watcher is not None:
            watcher.finish(new)
    made = (
        f"{int(out.num_new_tokens[0])} tokens in {int(out.num_forwards[0])} forwards "
        f"({float(out.tokens_per_forward[0]):.2f} per forward)"
    )
    if replay is not None and trace is not None:
        write_replay(replay, lm.tokenizer, given, new, trace.steps, title=Path(model).name, summary=made,
                     prompt_text=text)  # fmt: skip
        print(f"replay in {replay}", file=sys.stderr)
    if as_json:
        cycles = {} if out.tokens_per_cycle is None else {"tokens_per_cycle": round(float(out.tokens_per_cycle[0]), 4)}
        print(
            json.dumps(
                {
                    "text": out.texts[0],
                    "mode": mode or ("ar" if lm.diffusion is None else "diffusion"),
                    "num_new_tokens": int(out.num_new_tokens[0]),
                    "num_forwards": int(out.num_forwards[0]),
                    "num_prefill_forwards": int(out.num_prefill_forwards[0]),
                    "tokens_per_forward": round(float(out.tokens_per_forward[0]), 4),
                    **cycles,
                }
            )
        )
        return
    if watcher is None:
        print(out.texts[0][live.shown :] if live is not None else text + out.texts[0])
    print(made, file=sys.stderr)


@app.command(epilog="Example: unmask chat runs/q --confidence-threshold 0.8")
def chat(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model with a chat template.")],
    mode: Annotated[str | None, typer.Option(help="diffusion or ar; by default what the checkpoint is.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    confidence_threshold: Annotated[
        float | None, typer.Option(help="Commit tokens of higher probability: 1 is one a forward, 0 a block.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
) -> None:
    """Talk to a fine-tuned model; /reset forgets the conversation, /exit ends it."""
    import unmask
    from unmask.sampling import Threshold
    from unmask.supervised import check_template

    select = None if confidence_threshold is None else Threshold(confidence_threshold)
    lm = unmask.load(model)
    check_template(lm.tokenizer)
    lm._check_mode(mode or ("ar" if lm.diffusion is None else "diffusion"))
    messages: list[dict[str, str]] = []
    while (line := _ask("> ")) is not None:
        if line == "/exit":
            break
        if line == "/reset":
            messages.clear()
        if not line or line == "/reset":
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            live = _Stream(lm, asked, echo=False)
            out = lm.generate(
                asked,
                mode=mode,
                max_new_tokens=max_new_tokens,
                select=select,
                temperature=temperature,
                seed=seed,
                callback=live,
            )
        except ValueError as error:  # too long by now, or a template that refuses: the conversation can go on
            print(f"unmask: {' '.join(str(error).split())} (/reset begins anew)", file=sys.stderr)
            continue
        print(out.texts[0][live.shown :], flush=True)
        messages = [*asked, {"role": "assistant", "content": out.texts[0].strip()}]


def _ask(sign: str) -> str | None:
    """A line from standard input, without white space around it; None at its end."""
    try:
        return (input(sign) if sys.stdin.isatty() else input()).strip()
    except EOFError:
        return None


class _Stream:
    """Writes the text as far as it is final: up to the first position that is still masked."""

    def __init__(self, lm: Any, prompt: Any, echo: bool = True) -> None:
        self.lm, self.shown = lm, 0
        self.prompt = lm._prompt_ids(prompt, None)[0]
        self.tokens: dict[int, int] = {}
        if echo:
            print(prompt, end="", flush=True)

    def __call__(self, _row: int, positions: list[int], tokens: list[int]) -> None:
        self.tokens.update(zip(positions, tokens, strict=True))
        new: list[int] = []
        while len(self.prompt) + len(new) in self.tokens:
            new.append(self.tokens[len(self.prompt) + len(new)])
        text = self.lm.new_text(self.prompt, new)
        if not text.endswith("\ufffd"):  # half a character waits for its other half
            print(text[self.shown :], end="", flush=True)
            self.shown = max(self.shown, len(text))


@app.command(
    epilog='Example: unmask infill runs/d --prefix "Tom had a dog." --suffix " They were happy." --num-tokens 16'
)
def infill(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a converted model.")],
    prefix: Annotated[str, typer.Option(help="The text before the gap.")],
    suffix: Annotated[str, typer.Option(help="The text after the gap.")],
    num_tokens: Annotated[
        list[int], typer.Option(help="Tokens in the gap; repeated, candidate lengths to choose from by the bound.")
    ],
    max_denoising_steps: Annotated[
        int | None, typer.Option(help="Forwards at most (per block, if block-wise).")
    ] = None,
    confidence_threshold: Annotated[float | None, typer.Option(help="Commit tokens of higher probability.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the smallest set of tokens with this mass.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from so many tokens at most.")] = None,
    guidance_scale: Annotated[float, typer.Option(help="Of classifier-free guidance; 1 is none.")] = 1.0,
    attention: Annotated[
        str | None, typer.Option(help="bidirectional: let a block-wise model see the whole suffix.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the gap where this text appears.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    as_json: Json = False,
) -> None:
    """Fill the gap between a prefix and a suffix."""
    import unmask
    from unmask.sampling import Threshold

    lm = unmask.load(model)
    out = lm.infill(
        prefix,
        suffix,
        num_tokens[0] if len(num_tokens) == 1 else num_tokens,
        max_denoising_steps=max_denoising_steps,
        select=None if confidence_threshold is None else Threshold(confidence_threshold),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        guidance_scale=guidance_scale,
        attention=attention,
        stop_strings=stop,
        seed=seed,
    )
    if as_json:
        print(
            json.dumps(
                {
                    "text": out.texts[0],
                    "prefix": prefix,
                    "suffix": suffix,
                    "num_new_tokens": int(out.num_new_tokens[0]),
                    "num_forwards": int(out.num_forwards[0]),
                    "num_prefill_forwards": int(out.num_prefill_forwards[0]),
                    "tokens_per_forward": round(float(out.tokens_per_forward[0]), 4),
                }
            )
        )
        return
    print(prefix + out.texts[0] + suffix)
    print(f"{int(out.num_new_tokens[0])} tokens in {int(out.num_forwards[0])} forwards", file=sys.stderr)


@app.command(
    epilog="Example: unmask evaluate runs/q --data test.jsonl --num-samples 16 --json; "
    "unmask evaluate runs/q --tasks arc_easy,hellaswag --limit 200 --output results/q"
)
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or hub id.")],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="A .txt, .jsonl or .parquet file, or a folder of them; can be repeated."),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(help="Further data files.", show_default=False)] = None,
    max_documents: Annotated[int | None, typer.Option(help="Only the first documents.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Score with another block size.")] = None,
    num_samples: Annotated[int, typer.Option(help="Masks per block of the NELBO.")] = 8,
    exact: Annotated[bool, typer.Option(help="Enumerate all masks (blocks of up to 4 tokens).")] = False,
    text_column: Annotated[str, typer.Option(help="Column of .jsonl and .parquet files.")] = "text",
    skip_invalid: Annotated[bool, typer.Option(help="Leave broken documents out instead of stopping.")] = False,
    seed: Annotated[int, typer.Option(help="Of the masks, and of sampling.")] = 0,
    tasks: Annotated[
        str | None,
        typer.Option(help="Instead of --data: tasks of lm-evaluation-harness, or task files, with commas between."),
    ] = None,
    tasks_folder: Annotated[str | None, typer.Option(help="Tasks: folder with task files of your own.")] = None,
    mode: Annotated[str | None, typer.Option(help="Tasks: diffusion, ar or speculative.")] = None,
    limit: Annotated[float | None, typer.Option(help="Tasks: documents of each, or a share below 1.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Tasks: solved examples in the prompt.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Tasks: rows at a time, by default 16.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tasks: a shorter context than the model's.")] = None,
    confidence_threshold: Annotated[float | None, typer.Option(help="Tasks: of decoding, see generate.")] = None,
    max_denoising_steps: Annotated[int | None, typer.Option(help="Tasks: of decoding, see generate.")] = None,
    gen_kwargs: Annotated[
        str | None, typer.Option(help="Tasks: NAME=VALUE,... in place of a task's own, as max_gen_toks=64.")
    ] = None,
    apply_chat_template: Annotated[bool, typer.Option(help="Tasks: as messages in the chat template.")] = False,
    confirm_run_unsafe_code: Annotated[bool, typer.Option(help="Tasks: run code that the model wrote.")] = False,
    output: Annotated[Path | None, typer.Option(help="Tasks: folder for results.json and every sample.")] = None,
    as_json: Json = False,
) -> None:
    """Likelihood of text (exact NLL in AR mode, NELBO in diffusion mode), or tasks of lm-evaluation-harness."""
    if tasks is not None:
        if data or more or max_documents is not None:
            raise ValueError(f"--tasks {tasks} brings its own documents: leave --data, and take fewer with --limit")
        scoring: dict[str, Any] = {
            "num_samples": num_samples, "exact": exact, "block_size": block_size, "seed": seed, "mode": mode,
            "batch_size": batch_size or 16, "max_length": max_length, "max_denoising_steps": max_denoising_steps,
        }  # fmt: skip
        asked: dict[str, Any] = {
            "limit": limit, "num_fewshot": num_fewshot, "gen_kwargs": gen_kwargs,
            "apply_chat_template": apply_chat_template, "confirm_run_unsafe_code": confirm_run_unsafe_code,
        }  # fmt: skip
        _evaluate_tasks(model, tasks, tasks_folder, scoring, confidence_threshold, asked, output, as_json)
        return
    for option, given in {
        "--tasks-folder": tasks_folder, "--mode": mode, "--limit": limit, "--num-fewshot": num_fewshot,
        "--batch-size": batch_size, "--max-length": max_length, "--confidence-threshold": confidence_threshold,
        "--max-denoising-steps": max_denoising_steps, "--gen-kwargs": gen_kwargs, "--output": output,
        "--apply-chat-template": apply_chat_template or None,
        "--confirm-run-unsafe-code": confirm_run_unsafe_code or None,
    }.items():  # fmt: skip
        if given is not None:
            raise ValueError(f"{option} {given} is for --tasks: leave it out, or name tasks")
    if not data:
        raise ValueError("evaluate needs --data FILE, or --tasks NAME of lm-evaluation-harness")
    from unmask.data import find_files, read_documents

    files = find_files([*data, *(more or [])])
    if files is None:
        raise ValueError(f"data {data[0]!r} is no file here: evaluate takes .txt, .jsonl and .parquet files")
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"--max-documents {max_documents} must be at least 1")
    texts: list[str] = []
    for file in files:
        before = len(texts)
        for text in read_documents(file, text_column=text_column, skip_invalid=skip_invalid):
            if max_documents is not None and len(texts) >= max_documents:
                break
            texts.append(text)
        if len(texts) == before and not texts:
            raise ValueError(f"data file {str(file)!r} holds no documents")

    import unmask
    from unmask.evaluation.likelihood import summarise

    lm = unmask.load(model)
    if lm.diffusion is None and (exact or block_size is not None):
        raise ValueError(f"model {model!r} is an untouched AR model and has no blocks: leave --block-size and --exact")
    exact_nll = summarise(lm.nll(texts, show_progress=True))
    bound = None
    if lm.diffusion is not None:
        bound = summarise(
            lm.nelbo(texts, num_samples=num_samples, exact=exact, block_size=block_size, seed=seed, show_progress=True)
        )
    if as_json:
        print(
            json.dumps(
                {
                    "nll": exact_nll.nats_per_token,
                    "nelbo": bound and bound.nats_per_token,
                    "nelbo_standard_error": bound and (0.0 if exact else bound.standard_error),
                    "nll_bits_per_byte": exact_nll.bits_per_byte,
                    "nelbo_bits_per_byte": bound and bound.bits_per_byte,
                    "num_documents": exact_nll.num_documents,
                    "num_tokens": exact_nll.num_tokens,
                    "num_samples": num_samples if bound and not exact else None,
                    "block_size": (block_size or lm.diffusion.block_size) if lm.diffusion else None,
                }
            )
        )
        return
    print(f"{exact_nll.num_documents} documents, {exact_nll.num_tokens} predicted tokens")
    print(
        f"nll    {exact_nll.nats_per_token:.4f} nats/token  {exact_nll.bits_per_byte:.4f} bits/byte  (AR mode, exact)"
    )
    if bound is not None:
        spread = f" ± {bound.standard_error:.4f}" if bound.standard_error else ""
        how = "exact enumeration" if exact else f"{num_samples} masks per block"
        print(
            f"nelbo  {bound.nats_per_token:.4f}{spread} nats/token  {bound.bits_per_byte:.4f} bits/byte  "
            f"(diffusion mode, bound, {how})"
        )
    else:
        print("nelbo  none: an untouched AR model has no diffusion mode")


def _evaluate_tasks(
    model: str,
    tasks: str,
    folder: str | None,
    scoring: dict[str, Any],
    confidence_threshold: float | None,
    asked: dict[str, Any],
    output: Path | None,
    as_json: bool,
) -> None:
    """`evaluate --tasks`: `scoring` is for the harness's model, `asked` for its tasks."""
    try:
        from unmask.evaluation.harness import load_tasks, run_tasks, table, write_results
        from unmask.evaluation.lm_eval import HarnessLM
    except ImportError as error:
        raise ValueError(f'--tasks needs lm-evaluation-harness ({error}): pip install "unmask[eval]"') from error
    from unmask.sampling import Threshold

    select = None if confidence_threshold is None else Threshold(confidence_threshold)
    loaded = load_tasks([name.strip() for name in tasks.split(",")], folder)

    import unmask

    lm = HarnessLM(unmask.load(model), select=select, show_progress=True, **scoring)
    results = run_tasks(lm, loaded, **asked)
    if output is not None:
        write_results(results, output)
    if as_json:
        shown = {name: value for name, value in results.items() if name not in ("samples", "configs")}
        print(json.dumps(shown, default=str))
        return
    print(table(results))


@app.command(epilog="Example: unmask embed runs/q sentences.jsonl --output sentences.npy")
def embed(
    model: Annotated[str, typer.Argument(help="Folder or hub id.")],
    file: Annotated[Path, typer.Argument(help="A .txt, .jsonl or .parquet file of texts.")],
    output: Annotated[Path, typer.Option(help=".npy (vectors alone), .jsonl or .parquet (text and embedding).")],
    pattern: Annotated[
        str | None,
        typer.Option(help="causal, bidirectional or block_causal; by default bidirectional if converted, else causal."),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of .jsonl and .parquet files.")] = "text",
    skip_invalid: Annotated[bool, typer.Option(help="Leave broken documents out instead of stopping.")] = False,
    as_json: Json = False,
) -> None:
    """Texts as vectors: the mean of the last hidden states, one vector a document, in the file's order."""
    from unmask.data import find_files, read_documents
    from unmask.embed import check_output, write_embeddings

    check_output(output)
    files = find_files([file])
    if files is None:
        raise ValueError(f"file {str(file)!r} does not exist: embed takes .txt, .jsonl and .parquet files")
    texts = [text for one in files for text in read_documents(one, text_column=text_column, skip_invalid=skip_invalid)]
    if not texts:
        raise ValueError(f"file {str(file)!r} holds no documents")

    import unmask

    lm = unmask.load(model)
    vectors = lm.embed(texts, pattern, show_progress=True)
    write_embeddings(output, texts, vectors)
    used = pattern or ("causal" if lm.diffusion is None else "bidirectional")
    if as_json:
        print(json.dumps({"output": str(output), "num_texts": len(texts), "size": vectors.shape[1], "pattern": used}))
        return
    print(f"{len(texts)} vectors of {vectors.shape[1]} ({used}) in {output}")


@app.command(
    epilog="Example: unmask frontier runs/q --data test.jsonl --thresholds 0.5,0.7,0.9 --rule entropy-bound=0.1,0.5 "
    "--output results/q"
)
def frontier(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a converted model.")],
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Files whose documents' beginnings are the prompts.")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(help="Further data files.", show_default=False)] = None,
    task: Annotated[str | None, typer.Option(help="A task with answers instead of data: copy, reverse, ...")] = None,
    parent: Annotated[
        str | None, typer.Option(help="The AR model it was made from; by default what its folder records.")
    ] = None,
    thresholds: Annotated[str, typer.Option(help="Confidence thresholds to decode with.")] = "0.1,0.3,0.5,0.7,0.9",
    rule: Annotated[
        list[str] | None,
        typer.Option(help="More rules, as NAME=VALUE,...: factor, entropy-bound, stability, confidence or random."),
    ] = None,
    block_sizes: Annotated[str | None, typer.Option(help="Decode in blocks of these sizes.")] = None,
    batch_sizes: Annotated[str, typer.Option(help="Rows at a time in the timed runs.")] = "1,8,64",
    prompts: Annotated[int, typer.Option(help="Number of prompts.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a document that are given.")] = 24,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    rounds: Annotated[int, typer.Option(help="Timed runs of each setting, in turn with the AR parent.")] = 3,
    oracle: Annotated[
        int, typer.Option(help="Find the fewest forwards (speed of light) on so many prompts; 0 leaves it out.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of sampling, and of a task's problems.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for run.json, rows.jsonl and the figure; continued where it stopped.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Quality against tokens per forward and speed, always beside the AR parent in the same run."""
    files = [*(data or []), *(more or [])]
    if bool(files) == (task is not None):
        raise ValueError(f"--data {files} and --task {task}: give documents to begin with, or one task, and not both")

    import torch

    from unmask import sweep

    torch.set_num_threads(1)
    asked = sweep.Sweep(
        rules=sweep.parse_rules(thresholds, rule or []),
        block_sizes=(None,) if block_sizes is None else sweep.whole_numbers(block_sizes, "block_sizes"),
        batch_sizes=sweep.whole_numbers(batch_sizes, "batch_sizes"),
        num_prompts=prompts,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        rounds=rounds,
        oracle=oracle,
        temperature=temperature,
        seed=seed,
    )
    rows, run = sweep.run_frontier(model, asked, data=files, task=task, parent=parent, output=output)
    areas = sweep.areas(rows)
    if as_json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "aup": areas, "settings": run}))
        return
    print(sweep.table(rows))
    for name, area in areas.items():
        print(f"AUP {area:7.2f}  {name}")


@app.command(epilog="Example: unmask bench decode --json; unmask bench train runs/q --rounds 3")
def bench(
    what: Annotated[str, typer.Argument(help="train or decode.")],
    model: Annotated[str | None, typer.Argument(help="Folder or hub id instead of random weights.")] = None,
    shape: Annotated[str, typer.Option(help="Random Qwen3 weights of this shape: tiny, 0.6b, 4b or 8b.")] = "tiny",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; medians are reported.")] = 5,
    as_json: Json = False,
) -> None:
    """Speed and memory beside the plain AR baseline of the same model, as ratios from one run."""
    if what not in ("train", "decode"):
        raise ValueError(f"bench {what!r} is unknown: use train or decode")
    if rounds < 1:
        raise ValueError(f"--rounds {rounds} must be at least 1")

    import torch

    from unmask.bench import bench_train
    from unmask.bench_decode import bench_decode

    torch.set_num_threads(1)
    run: Any = bench_train if what == "train" else bench_decode
    cases = run(model or shape, rounds)
    settings = {
        "shape": model or shape,
        "rounds": rounds,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": 1,
        "unmask": __version__,
        "torch": torch.__version__,
    }
    if as_json:
        print(json.dumps({"cases": [asdict(case) for case in cases], "settings": settings}))
        return
    print("  ".join(f"{name} {value}" for name, value in settings.items()))
    for case in cases:
        print(f"{case.case:20} ratio {case.ratio:.3f}   ours {case.value:.4g}, AR {case.baseline:.4g} {case.unit}")


@app.command(
    epilog="Example: unmask study attention stories260k --data train.txt --eval valid.txt --output runs/attention "
    "--max-tokens 600000 --seeds 0,1,2"
)
def study(
    name: Annotated[
        str | None, typer.Argument(help="A study that ships with unmask, or a .toml file; without it, list them.")
    ] = None,
    model: Annotated[str | None, typer.Argument(help="Folder or hub id of the AR parent.")] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Training text of every arm; can be repeated.")
    ] = None,
    evaluation: Annotated[
        list[str] | None, typer.Option("--eval", help="Held-out text that all arms are measured on; can be repeated.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the study: runs, rows.jsonl, report.md.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Training tokens of every arm.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds with commas between, as 0,1,2.")] = None,
    arms: Annotated[str | None, typer.Option(help="Only these arms, with commas between.")] = None,
    as_json: Json = False,
) -> None:
    """Compare recipes and settings on one parent at equal tokens; an interrupted study goes on when run again."""
    from unmask.study import choose, load_study, run_study, study_names

    if name is None:
        found = {known: load_study(known).summary for known in study_names()}
        print(json.dumps(found) if as_json else "\n".join(f"{known:16} {text}" for known, text in found.items()))
        return
    chosen = choose(
        load_study(name), max_tokens=max_tokens, seeds=None if seeds is None else _numbers("--seeds", seeds),
        arms=None if arms is None else [arm.strip() for arm in arms.split(",")],
    )  # fmt: skip
    if model is None or not data or not evaluation or output is None:
        raise ValueError(f"study {name!r} needs a MODEL, --data, --eval and --output")
    rows = run_study(chosen, model, data, evaluation, output)
    if as_json:
        print(json.dumps({"study": chosen.name, "output": str(output), "rows": rows}))
    else:
        print((output / "report.md").read_text(), end="")


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r} must be whole numbers with commas between") from None


@app.command(epilog="Example: unmask recipes efficient-dlm")
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show the settings of this recipe.")] = None, as_json: Json = False
) -> None:
    """List the recipes, or the settings of one."""
    import unmask
    from unmask.settings import recipe_summary

    found = unmask.recipes()
    if name is not None and name not in found:
        raise ValueError(f"recipe {name!r} is unknown: use one of {', '.join(found)}")
    if as_json:
        print(json.dumps(found if name is None else {name: found[name]}))
    elif name is None:
        for recipe in found:
            print(f"{recipe:16} {recipe_summary(recipe)}")
    else:
        print(f"# {recipe_summary(name)}")
        for key, value in found[name].items():
            print(f"{key} = {'(from the parent)' if value is None else json.dumps(value)}")


@app.command(epilog="Example: unmask demo; unmask demo Qwen/Qwen3-0.6B-Base --data corpus.txt --output runs/q")
def demo(
    model: Annotated[str | None, typer.Argument(help="Folder or hub id; by default a tiny base made here.")] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Text to adapt on; by default Python's own sources.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where base and converted model go.")] = Path("runs/demo"),
    max_tokens: Annotated[int, typer.Option(help="Training tokens of the conversion.")] = 400_000,
) -> None:
    """The whole job on a default: make a tiny AR base, convert it, generate with it and measure it."""
    from unmask.demo import run_demo

    run_demo(model, data, output, max_tokens)


def _split_settings(items: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Further data files, and SETTING=VALUE pairs with TOML values (bare words are strings)."""
    files, chosen = [], {}
    for item in items:
        name, separator, raw = item.partition("=")
        if not separator or not name.isidentifier():
            files.append(item)
            continue
        try:
            chosen[name] = tomllib.loads(f"value = {raw}")["value"]
        except tomllib.TOMLDecodeError:
            chosen[name] = raw
    return files, chosen


def main() -> None:
    """Entry point of the `unmask` command."""
    try:
        code = app(standalone_mode=False)
    except (ValueError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        # Usage errors of the parser (typer brings its own copy of click) know their exit code and message.
        if not hasattr(error, "exit_code") or not hasattr(error, "format_message"):
            raise
        _fail(error.format_message() + _given(getattr(error, "param", None)))
    sys.exit(code or 0)


def _given(param: Any) -> str:
    """The value that the command line gave an option, for messages that leave it out."""
    for option in getattr(param, "opts", ()):
        if option in sys.argv[:-1]:
            return f" (got {sys.argv[sys.argv.index(option) + 1]!r})"
    return ""


def _fail(message: str) -> None:
    line = " ".join(message.split()) or "bad input"
    print(f"unmask: error: {line}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
