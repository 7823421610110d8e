"""smollm2: a real model on a CPU: SmolLM2-135M-Instruct learns three families of reasoning-gym.

A rule-based solver works the problems out; what it writes is verified by the families' own verifiers. The student is
fine-tuned on some of it (`sft`), a teacher on twice as much, and then the student learns from pairs of the solver's
right and its own wrong answers, and from the teacher's distributions along both (`dpd`). `evaluation` measures all of
them on problems that nobody trained on. What `sft` solves sometimes, `rl` learns by trial (GRPO); `transfer` measures
that on unseen problems of the three families and of two that nothing was trained on. Needs
`pip install 'upweight[gym]'`, and the model: from the hub, or `--model DIRECTORY`.

`upweight plan smollm2` says how long it takes here. `--until report` ends before the reinforcement, `--until report_rl`
leaves the distillation out, and `--scale 0.05` goes through every step in minutes, with too few problems to tell the
checkpoints apart.
"""

from upweight.app.recipe import Recipe, Step
from upweight.core.protocols import Limits
from upweight.stages import adopt, collect, distill, evaluate, gate, imitate, pair, reinforce, report, sft
from upweight.synthesize.difficulty import Gate
from upweight.synthesize.pairs import PairRules
from upweight.synthesize.portions import Portions, Take
from upweight.synthesize.solver import RuleBasedSolver
from upweight.train.optimizer import OptimizerConfig
from upweight.verify.gym import Gym
from upweight.verify.reward import RewardConfig

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FAMILIES = {
    "chain_sum": {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 3},
    "simple_equations": {"min_terms": 2, "max_terms": 2},
    "leg_counting": {"min_animals": 2, "max_animals": 4},
}
NEVER_TRAINED = {
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "max_value": 50},
}
ANSWER_TOKENS = 128


def recipe(scale: float = 1.0, seed: int = 0, model: str = MODEL) -> Recipe:
    """The whole run; `model` is a hub name or a directory."""

    def of(amount: int) -> int:
        return max(8, round(amount * scale))

    adamw = OptimizerConfig(kind="adamw")
    sampled = Limits(ANSWER_TOKENS)
    taught, paired, tried = of(240), of(80), of(570)
    problems = Step(
        "problems",
        collect,
        collect.Config(
            {
                "gym": Gym(FAMILIES, count=of(420), seed=seed),
                "never_trained": Gym(NEVER_TRAINED, count=of(40), seed=seed),
            },
            reserved_share=0.1,
        ),
    )
    base = Step("base", adopt, adopt.Config(model))

    def solved(name: str, portion: Take) -> Step:
        files: Portions = {"gym.jsonl": portion}
        return Step(name, imitate, imitate.Config(files, author=RuleBasedSolver()), {"problems": problems})

    def tuned(name: str, start: Step, examples: Step) -> Step:
        config = sft.Config(
            data=(sft.Part(f"{examples.name}/conversations.jsonl"),),
            epochs=1,
            context=256,
            batch_tokens=256,
            microbatch_tokens=256,
            learning_rate=1e-4,
            optimizer=adamw,
            template=None,
        )
        return Step(name, sft, config, {"model": start, examples.name: examples})

    first = solved("solved", Take(taught))
    student = tuned("sft", base, first)
    second = solved("solved_more", Take(taught, after=taught))
    teacher = tuned("teacher", student, second)
    pairs = Step(
        "pairs",
        pair,
        pair.Config(
            {"gym.jsonl": Take(paired, after=2 * taught)},
            teacher=RuleBasedSolver(),
            teacher_samples=1,
            student_samples=2,
            student_limits=sampled,
            block=32,
            rules=PairRules(longest_ratio=2.5),
        ),
        {"problems": problems, "student": student},
    )
    distilled = Step(
        "dpd",
        distill,
        distill.Config(
            normalise="sequence",
            pairs_a_step=4,
            pairs_a_batch=4,
            row_tokens=512,
            learning_rate=5e-5,
            optimizer=adamw,
        ),
        {"model": student, "teacher": teacher, "pairs": pairs},
    )

    def measured(name: str, files: dict[str, str], samples: int, count: int, checkpoints: dict[str, Step]) -> Step:
        config = evaluate.Config(
            files,
            samples=samples,
            count=of(count),
            problems_a_block=32,
            limits=Limits(ANSWER_TOKENS, temperature=0.6, top_p=0.95),
        )
        return Step(name, evaluate, config, {"problems": problems, **checkpoints})

    checkpoints = {"base": base, "sft": student, "dpd": distilled}
    table = measured("evaluation", {"gym": "reserved_gym.jsonl"}, 4, 64, checkpoints)
    page = Step(
        "report",
        report,
        report.Config(title="SmolLM2-135M on reasoning-gym"),
        {step.name: step for step in (problems, first, second, teacher, pairs)} | checkpoints | {"evaluation": table},
    )
    tries = Step(
        "gate",
        gate,
        gate.Config(
            {"gym.jsonl": Take(tried, after=2 * taught + paired)},
            reward=RewardConfig("gym"),
            gate=Gate(count=8),
            limits=sampled,
            block=32,
        ),
        {"problems": problems, "model": student},
    )
    reinforced = Step(
        "rl",
        reinforce,
        reinforce.Config(
            reward=RewardConfig("gym"),
            steps=max(2, round(24 * scale)),
            problems_a_step=24,
            group=8,
            limits=sampled,
            learning_rate=5e-5,
            interpolation=0.7,
            optimizer=adamw,
            batch_tokens=1024,
            save_every_steps=4,
        ),
        {"model": student, "problems": tries},
    )
    transfer = measured(
        "transfer",
        {"trained families": "reserved_gym.jsonl", "families never trained": "never_trained.jsonl"},
        8,
        120,
        {"sft": student, "rl": reinforced},
    )
    page_of_rl = Step(
        "report_rl",
        report,
        report.Config(title="SmolLM2-135M on reasoning-gym: reinforcement"),
        {step.name: step for step in (first, student, tries, reinforced, transfer)},
    )
    return Recipe("smollm2", (page, page_of_rl), seed=seed)
