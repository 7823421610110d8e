"""What rollout/vllm.py uses of vLLM, looked up in the sources of a release without importing it: no GPU is needed.

    pip download --no-deps vllm==0.32.0 && unzip -q vllm-0.32.0-*.whl 'vllm/*.py' 'vllm/**/*.py' -d vllm-0.32
    python tests/acceptance/vllm_interface.py vllm-0.32

Exits with 1 where a name, a field, an option or a route is not there. What they do is tested by vllm_server.py.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

TRANSFER = "vllm/distributed/weight_transfer"
FIELDS = {
    "ParamMeta": {"name", "dtype", "shape"},
    "NCCLTrainerInitInfo": {"master_address", "master_port", "world_size", "packed", "rank"},
    "IPCTrainerInitInfo": {"packed", "rank"},
    "WeightTransferConfig": {"backend"},
}
METHODS = {
    ("WeightSource", "metadata"): set(),
    ("WeightSource", "__iter__"): set(),
    ("HTTPVLLMWeightSyncClient", "__init__"): {"timeout"},
    ("WeightTransferTrainerFactory", "trainer_init"): {"init_info", "client", "source"},
    ("TrainerWeightTransferEngine", "send_weights"): set(),
    ("TrainerWeightTransferEngine", "shutdown"): set(),
}
ROUTES = {"/pause": {"mode", "clear_cache"}, "/resume": set(), "/get_world_size": set(), "/health": set()}
WORDS = {  # option or request field -> where it is declared
    "weight_transfer_config": "vllm/engine/arg_utils.py",
    "logprobs_mode": "vllm/engine/arg_utils.py",
    "generation_config": "vllm/engine/arg_utils.py",
    "gpu_memory_utilization": "vllm/engine/arg_utils.py",
    "processed_logprobs": "vllm/config/model.py",
    "VLLM_SERVER_DEV_MODE": "vllm/envs.py",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "vllm/envs.py",
    "return_token_ids": "vllm/entrypoints/openai/completion/protocol.py",
    "skip_special_tokens": "vllm/entrypoints/openai/completion/protocol.py",
    "spaces_between_special_tokens": "vllm/entrypoints/openai/completion/protocol.py",
}


def parsed(root: Path, folders: tuple[str, ...]) -> Iterator[ast.Module]:
    """The modules below these folders."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            yield ast.parse(path.read_text())


def parameters(function: ast.AsyncFunctionDef | ast.FunctionDef) -> set[str]:
    """The names that a function takes."""
    return {one.arg for one in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)}


def lacking(root: Path) -> list[str]:
    """Everything that is used and is not in the sources below `root`."""
    classes: dict[str, ast.ClassDef] = {}
    routes: dict[str, str] = {}
    for module in parsed(root, (TRANSFER, "vllm/config", "vllm/entrypoints")):
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, node)
            if isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef):
                for decorator in node.decorator_list:
                    if (
                        isinstance(decorator, ast.Call)
                        and decorator.args
                        and isinstance(decorator.args[0], ast.Constant)
                    ):
                        routes.setdefault(str(decorator.args[0].value), ast.unparse(node))
    found = [f"class {name}" for name in {*FIELDS, *(name for name, _ in METHODS)} - {*classes}]

    def fields(name: str) -> set[str]:
        own = classes[name]
        here = {
            one.target.id for one in own.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        }
        bases = [base.id for base in own.bases if isinstance(base, ast.Name) and base.id in classes]
        return here.union(*(fields(base) for base in bases))

    for name, wanted in FIELDS.items():
        found += [f"{name}.{field}" for field in sorted(wanted - fields(name))] if name in classes else []
    for (name, method), wanted in METHODS.items():
        defined = (
            {one.name: one for one in classes[name].body if isinstance(one, ast.FunctionDef)} if name in classes else {}
        )
        if name in classes and method not in defined:
            found.append(f"{name}.{method}")
        elif method in defined:
            found += [f"{name}.{method}({one}=)" for one in sorted(wanted - parameters(defined[method]))]
    for route, wanted in ROUTES.items():
        if route not in routes:
            found.append(f"route {route}")
        found += [f"{route}?{name}" for name in sorted(wanted) if name not in routes.get(route, name)]
    return found + [f"{word} in {path}" for word, path in WORDS.items() if word not in (root / path).read_text()]


if __name__ == "__main__":
    missing = lacking(Path(sys.argv[1]))
    print("\n".join(f"not there: {name}" for name in missing) or "all that is used is there")
    sys.exit(bool(missing))
