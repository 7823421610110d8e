"""The command line: one function a verb. `upweight --help` lists them, `upweight VERB --help` explains one.

Each verb imports what it needs when it is called: torch and the data engines take seconds to load, `--help` must not.
"""

import errno
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction

from upweight.core.errors import UserError

INTERRUPTED = 130
MENDABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
)

app = tyro.extras.SubcommandApp()


@dataclass(frozen=True)
class Choice:
    """Which recipe, and where its artifacts live."""

    recipe: Positional[str]
    """A recipe's name (quickstart), or the path of a file of your own (my_recipe.py)."""
    scale: float | None = None
    """Size of the run: 1 is the recipe as published, 0.1 a tenth of its tokens. Default: the recipe's own."""
    seed: int | None = None
    """Seed of the whole run. Default: the recipe's own."""
    model: str | None = None
    """Checkpoint that the recipe starts from, a directory or a hub name, where it takes one (smollm2)."""
    root: Path = Path("runs")
    """Artifacts are kept in ROOT/RECIPE/STEP."""


Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Hardware:
    """Where the work runs. Results do not depend on it."""

    device: str = "cpu"
    """A torch device: cpu, cuda, cuda:1."""
    threads: int = 0
    """CPU threads of the tensor library; 0 leaves its default, one a core."""
    workers: int = 2
    """Processes for work that is parallel over documents or programs."""
    cluster: str = ""
    """A Ray cluster for work that is parallel over documents: its address, or local. Default: processes."""
    unsafe_execution: bool = False
    """Run programs that a model wrote without isolation where this machine offers none. They can do all you can."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether the compiler fuses the layers of a model in training; auto: on CUDA."""
    recompute: float = 0.0
    """Activation checkpointing: the share of the activations that is computed again instead of kept, 0 to 1."""
    sharding: Literal["replicated", "fsdp"] = "replicated"
    """Under torchrun: each process holds the whole model, or they share it out (FSDP)."""
    tensor: int = 1
    """Under torchrun: processes that hold parts of the same matrices (tensor parallelism)."""
    context: int = 1
    """Under torchrun: processes that take parts of the same rows (context parallelism)."""


@app.command
def run(
    choice: OmitArgPrefixes[Choice],
    hardware: OmitArgPrefixes[Hardware],
    rebuild: UseAppendAction[tuple[str, ...]] = (),
    until: str | None = None,
    track: UseAppendAction[tuple[str, ...]] = (),
    dry_run: bool = False,
) -> None:
    """Run a recipe: build each step that is missing, skip what is complete, continue what was interrupted.

    Stop it at any moment (Ctrl-C, kill, power); the same command goes on where it was. Start with: upweight run
    quickstart

    On several devices: torchrun --nproc-per-node 8 -m upweight.cli run RECIPE --device cuda

    Args:
        rebuild: Build this step anew, and everything that depends on it. May be given several times.
        until: Stop after this step.
        track: Send the metrics of every training step there as well: tensorboard, trackio, wandb, wandb-offline. May
            be given several times. metrics.jsonl is always written.
        dry_run: Say what would be done, and do nothing.
    """
    from upweight.app.runner import run as run_recipe
    from upweight.app.show import print_intended
    from upweight.train.parallel import joined

    machine = _machine(hardware)
    with joined(machine):  # all of it within, so that what several processes find wrong is said once
        recipe = _found(choice)
        if dry_run:
            print_intended(recipe, choice.root, rebuild=rebuild, until=until)
        else:
            run_recipe(recipe, choice.root, machine=machine, rebuild=rebuild, until=until, track=track)


@dataclass(frozen=True)
class Target:
    """Another machine to plan for than this one."""

    gpu: str | None = None
    """Its GPUs: A100, H100, H200, B200, L40S, RTX4090, RTX5090, or a name of your own with the four figures below."""
    gpus: int = 1
    """How many of them."""
    gpu_tflops: float | None = None
    """Peak of dense bf16 products of one, in 1e12 operations a second."""
    gpu_memory: float | None = None
    """Memory of one, in 1e9 bytes."""
    gpu_bandwidth: float | None = None
    """Bandwidth of its memory, in 1e9 bytes a second."""
    gpu_link: float | None = None
    """Bandwidth to other GPUs, one way, in 1e9 bytes a second."""
    gpu_price: float = 0.0
    """What an hour of one costs, in your currency; 0 leaves money out."""
    attained: float | None = None
    """The share of the peak that training attains; default 0.38."""


@app.command
def plan(
    choice: OmitArgPrefixes[Choice],
    hardware: OmitArgPrefixes[Hardware],
    target: OmitArgPrefixes[Target],
    price_per_hour: float = 0.0,
) -> None:
    """Say what a recipe will cost before anything runs: tokens, operations, memory, disk, time, money.

    On this machine times follow from a measurement that takes about a second. With --gpu they are those of another:
    upweight plan nanbeige4_3b --gpu H100 --gpus 256 --sharding fsdp --recompute 1 --gpu-price 2.5

    Args:
        price_per_hour: What an hour of this machine costs, in your currency; 0 leaves money out.
    """
    from upweight.app.cluster import describe
    from upweight.app.planner import print_plan

    cluster = None
    if target.gpu is None and target != Target():
        raise UserError(
            "--gpus, --gpu-price, --attained and the like describe another machine: name its GPU with --gpu"
        )
    if target.gpu is not None:
        if price_per_hour:
            raise UserError("--price-per-hour is of this machine: with --gpu, say --gpu-price, of one GPU")
        cluster = describe(
            target.gpu,
            count=target.gpus,
            tflops=target.gpu_tflops,
            memory_gb=target.gpu_memory,
            bandwidth_gb=target.gpu_bandwidth,
            link_gb=target.gpu_link,
            price_per_hour=target.gpu_price,
            attained=target.attained,
        )
    print_plan(_found(choice), _machine(hardware), price_per_hour, cluster)


@app.command
def show(choice: OmitArgPrefixes[Choice], step: str | None = None) -> None:
    """Show the state of each step, and the lineage of the final checkpoint down to the documents.

    Args:
        step: Show one step in full instead: its settings, figures and examples.
    """
    from upweight.app.show import print_state, print_step

    recipe = _found(choice)
    if step is None:
        print_state(recipe, choice.root)
    else:
        print_step(recipe, choice.root, step)


@app.command
def report(choice: OmitArgPrefixes[Choice], out: Path = Path("report.html"), follow: int = 0) -> None:
    """Write one self-contained HTML page about what is complete so far, also while a run goes on.

    Args:
        out: The file to write.
        follow: Write it again every FOLLOW seconds until all is complete; an open browser reads it again as well.
    """
    from upweight.app.show import follow_report, write_report

    if follow > 0:
        follow_report(_found(choice), choice.root, out, follow)
    else:
        print(write_report(_found(choice), choice.root, out))


@app.command(name="eval")
def evaluate(
    models: Positional[tuple[str, ...]],
    on: UseAppendAction[tuple[str, ...]],
    hardware: OmitArgPrefixes[Hardware],
    k: int = 0,
    count: int = 0,
    judge: str | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    dtype: Dtype = "auto",
    root: Path = Path("runs"),
    out: Path = Path("evals"),
    inspect_logs: Path | None = None,
) -> None:
    """Measure models on benchmarks: avg@k with 95% intervals, and paired differences between two of them.

    Example: upweight eval quickstart:sft quickstart:dpd --on aime2024,gsm8k=test.jsonl --k 8

    Every sample is kept with its verdict and reason in OUT/MODEL/BENCHMARK.jsonl. A problem that the same model was
    asked in the same way before is not sampled again; a run that was stopped goes on.

    Args:
        models: A checkpoint directory, RECIPE for its final checkpoint, RECIPE:STEP, a hub name such as
            Qwen/Qwen3-0.6B, or an OpenAI-compatible endpoint such as http://127.0.0.1:8000/v1#NAME.
        on: What to measure on, with commas between or given several times: aime2024, aime2025, arena_hard, bfcl,
            bits_per_byte, fullstack, gpqa, gsm8k, humaneval, ifeval, math500, mbpp, reasoning_gym, supergpqa. Their
            data come from the hub, from a package, or from a file, NAME=FILE; NAME:PART+PART takes parts. Or a file of
            your own problems, one JSON object a line, {"question": ..., "answer": ...} or {"question": ..., "tests":
            [...]}, or a Python file with a benchmark of your own.
        k: Samples of each problem; 0 takes the benchmark's own, 8 or 3.
        count: So many problems of each, evenly from all; 0 takes all.
        judge: The model that judges, named like any other, for benchmarks that need one (arena_hard).
        temperature: 0 is greedy. Default: 0.6, as the report.
        top_p: Keep the smallest set of tokens with this probability. Default: 0.95, as the report.
        max_new_tokens: Longer answers are cut off and counted. Default: 65,536, or what the model's context leaves.
        seed: Seed of the sampling, and of what a benchmark draws (the order of options).
        dtype: What local weights are held in. auto: bfloat16 on CUDA, float32 elsewhere.
        root: Where recipes keep their artifacts.
        out: Where the samples and the table are written.
        inspect_logs: Also write the results there as logs that the viewer of inspect-ai opens.
    """
    from upweight.app.measure import Decoding, measure_models

    decoding = Decoding(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    measure_models(
        models,
        on,
        root=root,
        out=out,
        k=k,
        count=count,
        decoding=decoding,
        judge=judge,
        machine=_machine(hardware),
        dtype=None if dtype == "auto" else dtype,
        inspect_logs=inspect_logs,
    )


@app.command
def ablate(
    hardware: OmitArgPrefixes[Hardware],
    claim: Positional[str] = "",
    seeds: int = 3,
    scale: float | None = None,
    root: Path = Path("runs/claims"),
    write: Path | None = None,
    annotated: str | None = None,
    rebuild: UseAppendAction[tuple[str, ...]] = (),
) -> None:
    """Put a claim of the recipe to the test: the same training with and without, over several seeds, with intervals.

    Without a claim, lists those that there are. A run that was stopped goes on; seeds can be added later.

    Args:
        claim: A claim's name, or a file of your own: a recipe whose goal evaluates the checkpoints to compare.
        seeds: Run with the seeds 0 to SEEDS - 1.
        scale: Size of the runs: 1 is the claim as published. Default: the claim's own.
        root: Artifacts are kept in ROOT/seedN; the result lies in ROOT/CLAIM.json.
        write: Also put the result into this Markdown file, as a section of its own.
        annotated: Documents with the labels of a strong model, for the claims about labels.
        rebuild: Build this step anew for every seed, and everything that depends on it. May be given several times.
    """
    from upweight.app.ablate import ablate as put_to_the_test
    from upweight.app.ablate import print_claims

    if not claim:
        print_claims()
        return
    put_to_the_test(
        claim,
        seeds=range(seeds),
        scale=scale,
        root=root,
        machine=_machine(hardware),
        write=write,
        annotated=annotated,
        rebuild=rebuild,
    )


@app.command
def distill(
    student: Positional[str],
    pairs: Path,
    hardware: OmitArgPrefixes[Hardware],
    teacher: str | None = None,
    out: Path = Path("distilled"),
    cached: int = 0,
    endpoint: str | None = None,
    align: bool = False,
    sequence: float = 1.0,
    positive: float | None = None,
    negative: float | None = None,
    beta: float = 0.1,
    direction: Literal["forward", "reverse", "jensen_shannon"] = "forward",
    temperature: float = 1.0,
    normalise: Literal["token", "sequence"] = "token",
    epochs: int = 1,
    pairs_a_step: int = 32,
    pairs_a_batch: int = 4,
    learning_rate: float = 5e-6,
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
    rebuild: UseAppendAction[tuple[str, ...]] = (),
) -> None:
    """Distil a teacher into a student on your own preference pairs: DPD, or DPO alone without a teacher.

    L = sequence * DPO + positive * KL on the chosen responses + negative * KL on the rejected ones. A weight of 0
    leaves its term out, so that 1/0/0 is DPO, 0/1/0 distillation on the chosen and 0/0/1 on the rejected responses. The
    reference is the student as it is now. A killed run goes on with the same command; the checkpoint is in
    OUT/dpd/distilled/model.

    Args:
        student: A checkpoint directory, or a name on the hub.
        pairs: A file of pairs, one JSON object a line: {"prompt": ..., "chosen": ..., "rejected": ...}, each a text or
            a list of messages.
        teacher: A checkpoint directory, or a name on the hub; with --endpoint the name it has
            there.
        out: Where the artifacts are kept.
        cached: Ask the teacher once, before training, and keep this many tokens of each of its distributions (32 are
            136 to 200 bytes a token); 0 runs it beside the student.
        endpoint: Ask the teacher at this address (vLLM's, up to and with /v1) for its prompt_logprobs; sets --cached
            20.
        align: Accept a teacher of another tokenizer, and compare where the tokens of both coincide; sets --cached 32.
        sequence: Weight of the DPO term.
        positive: Weight of the KL term on chosen responses. Default: 1 with a teacher, 0 without.
        negative: Weight of the KL term on rejected responses. Default: 1 with a teacher, 0 without.
        beta: How strongly DPO's margin over the reference counts.
        direction: Of the KL terms; forward is KL(teacher || student).
        temperature: Both models' logits are divided by it in the KL terms.
        normalise: token averages the KL terms over a response's tokens, sequence sums them.
        epochs: Passes over the pairs.
        pairs_a_step: Pairs of one optimizer step.
        pairs_a_batch: Pairs of one forward pass; the result does not depend on it.
        learning_rate: Highest of the schedule (AdamW, linear warmup, linear decay to a tenth).
        dtype: Of the matrix products.
        seed: Of the order of the pairs.
        rebuild: Build this step anew (student, pairs, teacher, signal, distilled), and everything that depends on it.
            May be given several times.
    """
    from upweight.app.distilling import Wanted, distilling
    from upweight.app.runner import run as run_recipe
    from upweight.train.parallel import joined

    wanted = Wanted(student, str(pairs), teacher, cached, endpoint, align)
    settings = {
        "sequence": sequence,
        "positive": float(teacher is not None) if positive is None else positive,
        "negative": float(teacher is not None) if negative is None else negative,
        "beta": beta,
        "direction": direction,
        "temperature": temperature,
        "normalise": normalise,
        "epochs": epochs,
        "pairs_a_step": pairs_a_step,
        "pairs_a_batch": pairs_a_batch,
        "learning_rate": learning_rate,
        "dtype": dtype,
    }
    machine = _machine(hardware)
    with joined(machine):
        run_recipe(distilling(wanted, settings, seed), out, machine=machine, rebuild=rebuild)
    print(f"the checkpoint is in {out / 'dpd' / 'distilled' / 'model'}")


@app.command
def compare(
    bases: Positional[tuple[str, ...]],
    data: UseAppendAction[tuple[str, ...]],
    on: UseAppendAction[tuple[str, ...]],
    hardware: OmitArgPrefixes[Hardware],
    samples: int = 500_000,
    epochs: int = 2,
    row_tokens: int = 4096,
    batch_tokens: int = 131_072,
    microbatch_tokens: int = 8192,
    learning_rate: float = 2e-5,
    dtype: Literal["float32", "bfloat16"] = "float32",
    k: int = 0,
    count: int = 0,
    max_new_tokens: int | None = None,
    seed: int = 0,
    name: str = "bases",
    root: Path = Path("runs"),
    out: Path = Path("evals"),
    rebuild: UseAppendAction[tuple[str, ...]] = (),
) -> None:
    """Compare base models by fine-tuning all of them alike, as the report does: one table at the end.

    Example: upweight compare base_a base_b --data chats.jsonl --data owner/name --on gsm8k,ifeval --samples 500000

    Args:
        bases: Model directories, RECIPE:STEP, or hub names; two or more.
        data: Conversations to tune on: a path or pattern of .jsonl or .parquet files, or a data set on the hub. Given
            several times, every base is tuned on each of them apart.
        on: What to measure on afterwards, as for `upweight eval`.
        samples: Conversations of each set, evenly from all of it; 0 takes all.
        epochs: Passes over them.
        row_tokens: Tokens of a row; longer conversations are left out and counted.
        batch_tokens: Tokens of one optimizer step.
        microbatch_tokens: Tokens of one forward pass.
        learning_rate: Highest of the schedule, with AdamW.
        dtype: What matrix products are computed in.
        k: Samples of each problem; 0 takes the benchmark's own.
        count: So many problems of each benchmark, evenly from all; 0 takes all.
        max_new_tokens: Longer answers are cut off and counted. Default: 65,536, or what the context leaves.
        seed: Seed of training and sampling.
        name: The tuned models are kept in ROOT/NAME.
        root: Where recipes keep their artifacts.
        out: Where the samples and the table are written.
        rebuild: Build this step anew, and everything that depends on it. May be given several times.
    """
    from upweight.app.compare import Tuning, compare_bases
    from upweight.app.measure import Decoding

    tuning = Tuning(samples, epochs, row_tokens, batch_tokens, microbatch_tokens, learning_rate, dtype)
    compare_bases(
        bases,
        data,
        on,
        tuning=tuning,
        root=root,
        name=name,
        out=out,
        machine=_machine(hardware),
        seed=seed,
        k=k,
        count=count,
        decoding=Decoding(max_new_tokens=max_new_tokens, seed=seed),
        rebuild=rebuild,
    )


@app.command
def chat(
    model: Positional[str],
    hardware: OmitArgPrefixes[Hardware],
    system: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.95,
    max_new_tokens: int = 512,
    thinking: bool = True,
    against: str | None = None,
    each_line: bool = False,
    seed: int = 0,
    dtype: Dtype = "auto",
    root: Path = Path("runs"),
) -> None:
    """Talk to a model in the terminal. /new starts over, /quit leaves.

    What comes from a pipe is one message, whole, and is answered once: upweight chat quickstart < question.txt

    Args:
        model: A checkpoint directory, RECIPE for its final checkpoint, RECIPE:STEP, or a hub name.
        against: A second model that answers beside the first, to compare.
        each_line: Each line of a pipe is a question of its own, answered without the others.
        system: A system message to begin with.
        temperature: 0 is greedy.
        top_p: Keep the smallest set of tokens with this probability.
        max_new_tokens: Longer answers are cut off.
        thinking: Show the thinking, dimmed.
        seed: Seed of the sampling.
        dtype: What local weights are held in. auto: bfloat16 on CUDA, float32 elsewhere.
        root: Where recipes keep their artifacts.
    """
    from upweight.app.chat import chat as talk
    from upweight.core.protocols import Limits

    try:
        limits = Limits(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    except ValueError as error:
        raise UserError(str(error)) from error
    talk(
        [model, against] if against else [model],
        root=root,
        limits=limits,
        machine=_machine(hardware),
        dtype=None if dtype == "auto" else dtype,
        system=system,
        thinking=thinking,
        each_line=each_line,
    )


@app.command
def serve(
    model: Positional[str],
    hardware: OmitArgPrefixes[Hardware],
    host: str = "127.0.0.1",
    port: int = 8000,
    max_new_tokens: int = 2048,
    concurrent: int = 128,
    rows: int = 64,
    dtype: Dtype = "auto",
    root: Path = Path("runs"),
) -> None:
    """Serve a model over HTTP: the OpenAI interface below /v1, and a page to chat at /.

    Args:
        model: A checkpoint directory, or RECIPE for its final checkpoint, or RECIPE:STEP.
        host: The address to listen on. The default can be reached from this machine alone; there is no password.
        port: The port to listen on.
        max_new_tokens: The longest answer that a request may ask for.
        concurrent: Answers being made or waiting at a time; more requests are turned away with status 429.
        rows: Answers decoded together; fewer where 4 GB, on CUDA half of its memory, do not hold so many contexts.
        dtype: What the weights are held in. auto: bfloat16 on CUDA, float32 elsewhere.
        root: Where recipes keep their artifacts.
    """
    from upweight.app.serve import ServeConfig
    from upweight.app.serve import serve as serve_model

    config = ServeConfig(host=host, port=port, max_new_tokens=max_new_tokens, concurrent=concurrent, rows=rows)
    held = None if dtype == "auto" else dtype
    serve_model(model, root=root, machine=_machine(hardware), config=config, dtype=held)


@app.command
def new(path: Positional[Path]) -> None:
    """Write a commented recipe to start from. It runs as it is: upweight new my_recipe.py && upweight run my_recipe.py

    Args:
        path: The file to write; an existing one is left alone.
    """
    from upweight.app.new import write_start

    print(write_start(path))


@app.command
def annotate(
    documents: Positional[str],
    out: Positional[Path],
    hardware: OmitArgPrefixes[Hardware],
    model: UseAppendAction[tuple[str, ...]],
    endpoint: str = "",
    key_variable: str = "OPENAI_API_KEY",
    schema: bool = True,
    count: int = 0,
    agreed_on: int = 20,
    attempts: int = 3,
    price_read: float = 0.0,
    price_written: float = 0.0,
    most_in_flight: int = 16,
    root: Path = Path("runs"),
) -> None:
    """Have a strong model score documents 0-9 on the 20 quality dimensions; a tagger is trained from that.

    Answers are checked, asked for again where they cannot be used, and kept as they come: the same command goes on
    where it was stopped, and pays for nothing twice. A second --model scores some documents too, for the agreement.

    upweight annotate corpus.jsonl annotations --endpoint https://host/v1 --model strong --count 500

    Args:
        documents: JSON lines or parquet with a text (a file or a pattern, here or s3://), or a directory of text files.
        out: Where annotated.jsonl, summary.json and the kept answers are written.
        model: Who annotates: a name that the endpoint knows, or a checkpoint. The first scores all documents.
        endpoint: A server that speaks the OpenAI interface, up to and with /v1. Default: a checkpoint on this machine.
        key_variable: The environment variable that holds the server's key.
        schema: Have the server hold answers to a JSON schema; --no-schema for servers that cannot.
        count: Take the first COUNT documents; 0 takes all.
        agreed_on: So many documents are scored by every model.
        attempts: How often one document is asked for.
        price_read: Of a million tokens read.
        price_written: Of a million tokens written.
        most_in_flight: Requests at once.
        root: Where recipes keep their artifacts, for a checkpoint named RECIPE:STEP.
    """
    from upweight.app.annotating import Endpoint, annotate_documents
    from upweight.curate.annotate import Asking

    annotate_documents(
        documents,
        out,
        model,
        endpoint=Endpoint(endpoint, key_variable, schema, price_read, price_written, most_in_flight),
        count=count,
        agreed_on=agreed_on,
        asking=Asking(attempts=attempts),
        root=root,
        machine=_machine(hardware),
    )


tagger = tyro.extras.SubcommandApp()
app.command(tagger, name="tagger")


@tagger.command
def train(
    annotated: Positional[Path],
    out: Positional[Path],
    seed: int = 0,
    encoder: str = "",
    epochs: int = 4,
    learning_rate: float = 1e-4,
    part: float = 0.5,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "cpu",
    threads: int = 0,
) -> None:
    """Distil annotated documents into a small tagger: the 20 quality scores of any text.

    With --encoder a transformer is fine-tuned and joined with the small tagger: better, and for GPUs.

    upweight tagger train annotated.jsonl my_tagger --encoder sentence-transformers/all-MiniLM-L6-v2 --device cuda

    Args:
        annotated: Documents with their 20 scores, one JSON object a line.
        out: The tagger: a file, or with --encoder a directory.
        seed: Seed of the split that is held back and of the training.
        encoder: A model of the Hugging Face hub, or a directory.
        epochs: How often the encoder reads the documents; 0 leaves it as it came and trains its heads alone.
        learning_rate: Of the encoder, at its peak.
        part: Of the encoder in the scores, 0 to 1; the rest is the small tagger's.
        dtype: Of the encoder's matrix products in training.
        device: Where the encoder is trained: cpu, cuda, cuda:1.
        threads: CPU threads of the tensor library; 0 leaves its default, one a core.
    """
    from upweight.app.tagging import train_tagger, train_transformer

    if not encoder:
        train_tagger(annotated, out, seed)
        return
    from upweight.curate.encoder_training import Tuning
    from upweight.curate.tagger_training import Training

    tuning = Tuning(
        encoder, epochs=epochs, learning_rate=learning_rate, part=part, dtype=dtype, training=Training(seed=seed)
    )
    train_transformer(annotated, out, tuning, _machine(Hardware(device=device, threads=threads)))


@tagger.command
def score(texts: Positional[tuple[Path, ...]], weights: Path | None = None, device: str = "cpu") -> None:
    """Print the 20 quality scores of text files, one JSON object a line.

    Args:
        texts: Text files, each one document.
        weights: A tagger that you trained; the default is the one in the package.
        device: Where a transformer works: cpu, cuda, cuda:1.
    """
    from upweight.app.tagging import score_files

    score_files(texts, weights, device)


def _found(choice: Choice):  # type: ignore[no-untyped-def]  # Recipe: its module loads lazily
    from upweight.app.find import find_recipe

    return find_recipe(choice.recipe, {"scale": choice.scale, "seed": choice.seed, "model": choice.model})


def _machine(hardware: Hardware):  # type: ignore[no-untyped-def]  # Machine: its module loads lazily
    from upweight.app.environment import checked_machine

    return checked_machine(**vars(hardware))


def main() -> None:
    """The entry point. A UserError becomes one paragraph on stderr and its exit code; a defect shows its traceback."""
    # read when torch loads, which is in the verbs: a thread that spins while it waits for another keeps a core from it
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app.cli(prog="upweight", description=DESCRIPTION)
    except UserError as error:
        _leave(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        _leave(f"{error.strerror}: {error.filename or 'the disk'}. Check the path and its permissions and space", 2)
    except KeyboardInterrupt:
        _leave("stopped. What is complete is kept; the same command goes on from there", INTERRUPTED)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # all is written by now, and threads of torch.distributed that end after the interpreter may abort the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _leave(message: str, code: int) -> None:
    print(f"upweight: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


DESCRIPTION = """Train small reasoning models: the whole recipe, from raw documents to a measured model.

Begin with `upweight run quickstart`: every stage on this machine, in minutes."""

if __name__ == "__main__":
    main()
