"""The command line: `draftsmith <command>`. Wrong input ends in one sentence and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from draftsmith import __version__
from draftsmith.foundation import console
from draftsmith.foundation.errors import UserError

app = typer.Typer(
    name="draftsmith",
    help="Train, prove and measure drafters that make a language model answer faster without changing its answers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# torchrun reads --run as an abbreviation of its own, wherever it stands
RunFolder = Annotated[Path, typer.Option("--run", "-C", help="The run's folder.")]
RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", help="A recipe file, or the name of one that draftsmith brings; default: the run's own."),
]
Target = Annotated[str | None, typer.Option(help="Short for target.name=…: folder, hub id, GGUF file or smollm2.")]
Data = Annotated[
    str | None, typer.Option(help="Short for data.path=…: jsonl, parquet, a folder of them, or a hub data set.")
]
Server = Annotated[
    str | None, typer.Option(help="Short for regenerate.server.url=…: a server of the same target writes the answers.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Options of the recipe, dotted: train.seconds=60 select.ratio=0.7")
]
Kernels = Annotated[
    Literal["plain", "packed"],
    typer.Option(help="packed: half-precision weights are brought into the CPU's order once, not at every pass."),
]
Redo = Annotated[bool, typer.Option("--redo", help="Make it again although it is there.")]
Plan = Annotated[
    bool, typer.Option("--plan", help="Say what would run, how long, how much memory and disk; run nothing.")
]
Force = Annotated[bool, typer.Option("--force", help="Train although it would need more memory than there is.")]

RUN = Path("runs/quickstart")


def _version(wanted: bool) -> None:
    if wanted:
        console.say(f"draftsmith {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


@app.command()
def quickstart(
    overrides: Overrides = None,
    run: RunFolder = RUN,
    recipe: RecipeName = None,
    target: Target = None,
    data: Data = None,
    server: Server = None,
    plan: Plan = False,
    force: Force = False,
    redo: Annotated[
        list[str] | None, typer.Option("--redo", help="A stage to make again (may be given several times).")
    ] = None,
) -> None:
    """The whole path: prompts, answers, selection, a trained drafter, measured, exported. Interrupted, it goes on."""
    from draftsmith.commands import stage

    stage.whole(
        run, recipe, stage.assignments(overrides, target, data, server), plan=plan, redo=redo or [], force=force
    )


def _register(name: str, text: str) -> None:
    def command(
        overrides: Overrides = None,
        run: RunFolder = RUN,
        recipe: RecipeName = None,
        target: Target = None,
        data: Data = None,
        server: Server = None,
        redo: Redo = False,
        plan: Plan = False,
        force: Force = False,
    ) -> None:
        from draftsmith.commands import stage

        stage.one(
            name, run, recipe, stage.assignments(overrides, target, data, server), plan=plan, redo=redo, force=force
        )

    app.command(name, help=text)(command)


_register("prompts", "Make or read prompts and part them into train, dev and test.")
_register("regenerate", "Let the target answer the prompts in its own words.")


@app.command()
def score(
    overrides: Overrides = None,
    run: RunFolder = RUN,
    recipe: RecipeName = None,
    target: Target = None,
    data: Data = None,
    server: Server = None,
    redo: Redo = False,
    plan: Plan = False,
    cost: Annotated[
        bool, typer.Option("--cost", help="Write nothing; say what scores cost beside the pass and beside training.")
    ] = False,
) -> None:
    """Statistics of every answer token, in one frozen pass of the target."""
    from draftsmith.commands import cost as costs
    from draftsmith.commands import stage

    assigned = stage.assignments(overrides, target, data, server)
    if cost:
        costs.cost_of_scores(stage.opened(run, recipe, assigned))
    else:
        stage.one("score", run, recipe, assigned, plan=plan, redo=redo)


_register("select", "Choose the samples that are worth training on.")
_register("features", "Store the target's hidden states of what was kept.")
_register("train", "Train a drafter; the checkpoint that decodes best on dev is kept.")
_register("tune", "Choose the draft tree on dev, from costs measured on this machine.")


@app.command()
def bench(
    overrides: Overrides = None,
    run: RunFolder = RUN,
    recipe: RecipeName = None,
    target: Target = None,
    data: Data = None,
    server: Annotated[
        str | None,
        typer.Option(
            help="With --benchmark a server to measure too, short for --baselines server=…; else as elsewhere."
        ),
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            help="gsm8k, math-500, svamp, mt-bench, humaneval, mbpp, spec-bench[:category], or a jsonl file; several "
            "by commas. From the folder in DRAFTSMITH_DATA, else from the hub."
        ),
    ] = None,
    drafters: Annotated[
        list[str] | None, typer.Option(help="name=path of a run or a drafter (several times); default: the run's own.")
    ] = None,
    compose: Annotated[
        list[str] | None,
        typer.Option(
            help="Drafters put together, such as trie='merge:trie(math,chat,ngram,budget=15)' (several times); "
            "docs/specialists.md."
        ),
    ] = None,
    baselines: Annotated[
        list[str] | None,
        typer.Option(
            help="Others beside them, by commas: prompt-lookup, transformers, transformers-prompt-lookup[:TOKENS], "
            "assisted[:TOKENS]=FOLDER, name=http://… (name-plain=… is what name is compared with)."
        ),
    ] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Prompts of each benchmark at most.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of an answer at most.")] = None,
    temperatures: Annotated[str | None, typer.Option(help="By commas: 0,1")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Prompts decoded together.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Times that everything is measured.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws and of the choice of prompts.")] = None,
    assistant_tokens: Annotated[
        int | None, typer.Option(min=1, help="Drafted by transformers' assistant in a round; default: its heuristic.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of rows and summary; default: benchmarks/ in the run's.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="An earlier summary.json: exit code 1 if something is worse beyond intervals.")
    ] = None,
    redo: Redo = False,
    plan: Plan = False,
) -> None:
    """Plain against speculative decoding, in the same engine: on the run's test prompts, or on benchmarks."""
    from draftsmith.commands import bench as measuring
    from draftsmith.commands import stage

    assigned = stage.assignments(overrides, target, data, None if benchmark else server)
    given = {"prompts": prompts, "max_new_tokens": max_new_tokens, "batch": batch, "repeats": repeats, "seed": seed}
    wanted = measuring.Asked(
        benchmark or [],
        drafters or [],
        compose or [],
        [*(baselines or []), *([f"server={server}"] if benchmark and server else [])],
        assistant_tokens,
        {**given, "temperatures": measuring.numbers(temperatures)},
    )
    if benchmark and plan:
        raise UserError("--plan tells of a run's stages; there is none for --benchmark")
    if benchmark:
        results = measuring.bench(stage.opened(run, recipe, assigned), wanted, out or run / "benchmarks", redo)
    else:
        measuring.refuse_without_benchmark(wanted, out)
        stage.one("bench", run, recipe, assigned, plan=plan, redo=redo)
        results = [] if plan else measuring.stage_results(run)
    if against and not plan and not measuring.against(results, against):
        raise typer.Exit(1)


@app.command("verify-lossless")
def verify_lossless(
    target: Annotated[
        str | None, typer.Option(help="Folder, hub id, GGUF file or smollm2; default: the run's.")
    ] = None,
    drafters: Annotated[list[str] | None, typer.Option(help="name=path of a run or a drafter (several times).")] = None,
    compose: Annotated[
        list[str] | None, typer.Option(help="name=specification of several put together (several times).")
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="A jsonl file or a benchmark; default: made prompts.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts at most.")] = 20,
    temperatures: Annotated[str, typer.Option(help="By commas.")] = "0,1",
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer at most.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Prompts decoded together with drafters.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the draws and of the choice of prompts.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="float32 is exact; bfloat16 and float16 are judged token by token.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    kernels: Kernels = "plain",
    out: Annotated[Path | None, typer.Option(help="Write all comparisons and the verdict there, as JSON.")] = None,
) -> None:
    """Prove on your own models that drafters change no token: verdict in words and numbers. Exit code 1: they do."""
    from draftsmith.commands import lossless

    if not lossless.verify(
        target,
        drafters or [],
        compose=compose or [],
        prompts=prompts,
        count=count,
        temperatures=temperatures,
        max_new_tokens=max_new_tokens,
        batch=batch,
        seed=seed,
        dtype=dtype,
        device=device,
        kernels=kernels,
        out=out,
    ):
        raise typer.Exit(1)


@app.command()
def profile(
    out: Annotated[Path, typer.Option(help="The file of costs.")] = Path("profile.json"),
    target: Annotated[
        str | None, typer.Option(help="Folder, hub id, GGUF file or smollm2; default: the run's.")
    ] = None,
    drafters: Annotated[list[str] | None, typer.Option(help="name=path of a run or a drafter (several times).")] = None,
    batch: Annotated[str, typer.Option(help="Sequences decoded together, by commas.")] = "1,4",
    context: Annotated[str, typer.Option(help="Tokens in each, by commas.")] = "128,512",
    repeats: Annotated[int, typer.Option(min=1, help="Of which the median is taken.")] = 8,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    kernels: Kernels = "plain",
) -> None:
    """Measure what verifying and drafting cost here; the cost-aware growth reads it, decoding never looks at clocks."""
    from draftsmith.commands import profile as measuring

    measuring.profile(
        target,
        drafters or [],
        out,
        batches=batch,
        contexts=context,
        repeats=repeats,
        dtype=dtype,
        device=device,
        kernels=kernels,
    )


@app.command()
def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of runs or of benchmarks, several side by side; default: that of --run."),
    ] = None,
    run: RunFolder = RUN,
    recipe: RecipeName = None,
    out: Annotated[
        Path | None, typer.Option(help="The page, or its folder; default: in the run's folder, or comparison/.")
    ] = None,
) -> None:
    """Write report.html, one file with its figures beside it as PNG and SVG: of a run, or of several side by side."""
    from draftsmith.commands import stage

    stage.report(runs or [run], recipe, out)


@app.command()
def export(
    overrides: Overrides = None,
    run: RunFolder = RUN,
    recipe: RecipeName = None,
    to: Annotated[
        list[str] | None,
        typer.Option(help="vllm, sglang, speculators, transformers or gguf (may be given several times)."),
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="owner/name on the Hugging Face hub: upload it there instead, private at first.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: a new repository is public.")] = False,
) -> None:
    """Write the run's drafter as folders that servers load, with the commands that serve them."""
    from draftsmith.commands import stage

    stage.export(run, recipe, overrides or [], to or ["vllm"], push, private=not public)


@app.command()
def tokens(
    run: RunFolder = RUN,
    recipe: RecipeName = None,
    overrides: Overrides = None,
    most: Annotated[int, typer.Option(min=1, max=16, help="The longest chain that is looked at.")] = 6,
) -> None:
    """How many speculative tokens a server of chains (vLLM, llama.cpp) should draft: what each accepts and costs."""
    from draftsmith.commands import stage

    stage.tokens(run, recipe, overrides or [], most)


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder of any known make.")],
    target: Annotated[str, typer.Option(help="What it drafts for.")] = "smollm2",
    dtype: Annotated[
        str, typer.Option(help="The target's number format: auto, bfloat16, float16 or float32.")
    ] = "auto",
    served: Annotated[
        str | None,
        typer.Option(help="Address of an idle vLLM server of both: compare its acceptance with a replay of its texts."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="With --served: a benchmark or a jsonl file; default: made word problems.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="With --served: prompts at most.")] = 16,
    tokens: Annotated[int, typer.Option(min=2, help="With --served: tokens of an answer at most.")] = 64,
) -> None:
    """Say what is wrong with a checkpoint: keys, shapes, maps, layer ids, RoPE, a stored pass. Exit code 1: errors."""
    from draftsmith.commands import handover

    if not handover.check(folder, target, dtype, served, prompts, limit, tokens):
        raise typer.Exit(1)


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="A public EAGLE-3 or speculators checkpoint.")],
    out: Annotated[Path, typer.Option(help="The drafter's folder.")],
    target: Annotated[str, typer.Option(help="What it drafts for.")] = "smollm2",
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="A field that the checkpoint leaves open: field=value.")
    ] = None,
    keep_rope: Annotated[
        bool, typer.Option("--keep-rope", help="Its rotary embedding is not the target's, and it was trained so.")
    ] = False,
) -> None:
    """Make a drafter of a checkpoint from elsewhere."""
    from draftsmith.commands import handover

    handover.bring_in(folder, out, target, setting or [], keep_rope=keep_rope)


@app.command()
def doctor(
    target: Annotated[str | None, typer.Option(help="Also say what this target needs.")] = None,
    run: Annotated[Path, typer.Option("--run", help="Where runs would be written: whose disk is looked at.")] = Path(),
) -> None:
    """Say what is here, what a target needs, what will not work and how to mend it. Exit code 1: something will not."""
    from draftsmith.commands.doctor import doctor as examine

    if not examine(target, run):
        raise typer.Exit(1)


@app.command()
def chat(
    run: RunFolder = RUN,
    target: Annotated[str | None, typer.Option(help="The target; default: the run's.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this and end.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    plain: Annotated[bool, typer.Option("--plain", help="Without the drafter.")] = False,
    drafter: Annotated[
        list[str] | None, typer.Option(help="name=path of a run or a drafter (several times); default: the run's own.")
    ] = None,
    compose: Annotated[
        str | None, typer.Option(help="How they are put together: merge:trie(math,chat,ngram,budget=15)")
    ] = None,
) -> None:
    """Talk to the target with the run's drafter; tokens are coloured by who wrote them."""
    from draftsmith.commands.chat import chat as talk

    talk(
        run,
        target,
        temperature=temperature,
        seed=seed,
        max_new_tokens=max_new_tokens,
        plain=plain,
        prompt=prompt,
        drafters=drafter or [],
        compose=compose,
    )


@app.command()
def calibrate(
    overrides: Overrides = None,
    run: RunFolder = RUN,
    recipe: RecipeName = None,
    drafter: Annotated[
        list[str] | None, typer.Option(help="name=path of a run or a drafter, or ngram; default: the run's own.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write all of them into one file, by name.")] = None,
    router: Annotated[
        Path | None, typer.Option(help="Also fit a router for route:learned over these drafters, and write it here.")
    ] = None,
) -> None:
    """Fit the temperatures of drafters on the run's dev answers, by replay; merge:trie reads them if asked."""
    from draftsmith.commands import stage
    from draftsmith.commands.calibrate import calibrate as fit

    fit(stage.opened(run, recipe, overrides or []), drafter or [], out, router)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A data file, or an artefact's folder.")],
    row: Annotated[int, typer.Option(min=0, help="Which conversation or sample.")] = 0,
    flatness: Annotated[
        bool,
        typer.Option(
            "--flatness", help="Colour tokens by the target's flatness, and show the corpus's (what score wrote)."
        ),
    ] = False,
    html: Annotated[Path | None, typer.Option(help="With --flatness: write a page of it, too.")] = None,
    target: Annotated[str | None, typer.Option(help="Whose tokenizer and template; default: the run's.")] = None,
) -> None:
    """Look at a conversation as the trainer sees it, or at what an artefact holds."""
    from draftsmith.commands.inspect import inspect as look

    look(path, row=row, flatness=flatness, target=target, html=html)


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="Which study: sfdd, adaspec or taps.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Options of the preset, dotted: train.epochs=3 seeds=[0,1]")
    ] = None,
    preset: Annotated[str, typer.Option(help="smoke, cpu, gpu, or a YAML file.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="The study's folder; default: runs/studies/NAME-PRESET.")] = None,
    time_budget: Annotated[
        str | None, typer.Option(help="End cleanly after so long (8m); the same command goes on.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of prompts and benchmarks; default: $DRAFTSMITH_DATA.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say which cells would run; run nothing.")] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="sfdd: train on the flat, peaked or a random half of the tokens instead.")
    ] = False,
    table: Annotated[bool, typer.Option("--table", help="Print the tables of the results that are there.")] = False,
) -> None:
    """Run a grid of drafters that answers a question, with the paper's figures beside ours; interrupted, it goes on."""
    from draftsmith.commands import study as studies

    studies.study(
        name, preset, out, overrides or [], time_budget=time_budget, data=data, plan=plan, table=table, probe=probe
    )


def main() -> None:
    """Run the command line; a UserError is printed without a traceback, with exit code 2."""
    try:
        app()
    except UserError as problem:
        console.error(str(problem))
        sys.exit(2)
    except OSError as problem:
        # A disk or a permission is the user's to mend; anything else is ours and keeps its traceback.
        place = f"{problem.filename}: " if problem.filename else ""
        said = (problem.strerror or str(problem)).lower()
        console.error(f"{place}{said}; mend that, or choose another folder")
        sys.exit(2)
    except KeyboardInterrupt:
        console.say("\ninterrupted; the same command goes on from here")
        sys.exit(130)
