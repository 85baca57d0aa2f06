"""
Measurements on a GPU, in stages that take at most 8 minutes together: `make gpu`.

Each stage runs in its own process and has a time budget, so that an error, a crash or a hang of CUDA ends that stage
only. Results are kept in outputs/gpu/cuda.json: a stage that is done is not repeated (`--again` repeats it). When all
stages are through, benchmarks/gpu-DATE.json and docs/gpu.md are written. If OUT is set, as on a lent machine, results
and logs are copied there; `--publish FILE` then writes the two files from the results on another machine.

`DEVICE=cpu make gpu` rehearses all of it with small sizes, and publishes nothing. `--wheels FOLDER` installs the
packages of `make gpu-wheels` first, for a machine without network. This file imports only the standard library.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import page, wheels


# Seconds that each stage may take on a GPU, and all of them together. In the rehearsal, on a processor that others may
# use too, as many times more: there, they only end what hangs.
STAGES = {
    "machine": 40,
    "conformance": 110,
    "resume": 45,
    "speed": 130,
    "forecast": 20,
    "waits": 40,
    "learning": 80,
    "processes": 30,
    "compiled": 120,
}
ALL_STAGES = 480
REHEARSAL_PATIENCE = 20

ROOT = page.ROOT
FOLDER = ROOT / "outputs" / "gpu"
SITE = ROOT / "build" / "gpu-site"

Results = dict[str, Any]


def main() -> int:
    """Run the stages that are not done; the exit status is 0 if all are done or skipped."""
    arguments = parse_arguments()
    if arguments.publish:
        page.publish(json.loads(arguments.publish.read_text()))
        return 0
    if arguments.wheels:
        wheels.install(arguments.wheels, SITE)
    device = arguments.device
    results = earlier_results(device)
    patience = REHEARSAL_PATIENCE if device == "cpu" else 1
    end = time.monotonic() + patience * ALL_STAGES
    for name in arguments.stages:
        kept = results["stages"].get(name, {})
        if is_done(kept) and not arguments.again:
            other = "" if kept["sources"] == sources() else ", of other sources"
            print(f"{name:<12} kept{other}: {kept['line']}", flush=True)
            continue
        budget = min(patience * STAGES[name], end - time.monotonic())
        if budget < 1:
            print(f"{name:<12} not started: the time of all stages is over. The same command goes on here", flush=True)
            continue
        results["stages"][name] = stage = run_stage(name, device, budget)
        keep(results)
        print(f"{name:<12} {stage['status']} in {stage['seconds']:.0f} s: {stage['line']}", flush=True)
        if name == "machine" and not is_done(stage):
            return 1  # without the device, no other stage can run
    if device != "cpu":
        page.publish(results)
    return int(not all(is_done(results["stages"].get(name, {})) for name in arguments.stages))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default=os.environ.get("DEVICE", "cuda"))
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="only these")
    parser.add_argument("--again", action="store_true", help="also stages that are done")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first, without a network")
    parser.add_argument("--publish", type=Path, help="write the published files from these results, and run nothing")
    return parser.parse_args()


def is_done(stage: Results) -> bool:
    return stage.get("status") in ("done", "skipped")


# ---- A stage ----


def run_stage(name: str, device: str, budget: float) -> Results:
    """Run a stage in its own process, and return its status and results, which are partial if it was stopped."""
    output, log = FOLDER / f"{device}-{name}.json", FOLDER / f"{device}-{name}.log"
    FOLDER.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)
    start = time.monotonic()
    with log.open("w") as file:
        command = [sys.executable, "-m", "gpu.stage", name, device, str(output)]
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment(), cwd=ROOT, process_group=0
        )
        status = status_of(process, budget)
    seconds = round(time.monotonic() - start, 1)
    found: Results = json.loads(output.read_text()) if output.is_file() else {"line": "", "page": "", "figures": {}}
    if status == "done" and "skipped" in found["figures"]:
        status = "skipped"
    if status not in ("done", "skipped"):
        found["error"] = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        found["line"] = f"{found['line']}\n{found['error']}".strip()
    return {"status": status, "seconds": seconds, "budget": round(budget), "sources": sources(), **found}


def status_of(process: "subprocess.Popen[bytes]", budget: float) -> str:
    """Wait for a process for its time at most, end all processes of its group, and return its status."""
    try:
        code = process.wait(budget)
        return "done" if code == 0 else f"failed with status {code}"
    except subprocess.TimeoutExpired:
        return f"stopped after {budget:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own processes too, if any are left
        process.wait()


def environment() -> dict[str, str]:
    """Return the environment of a stage: it finds the wheels, the package, and the parts of tests and benchmarks."""
    site = [SITE] if (SITE / "installed.txt").is_file() else []
    paths = [*map(str, site), *(str(ROOT / folder) for folder in ("src", "benchmarks", "tests"))]
    paths += [path for path in [os.environ.get("PYTHONPATH")] if path]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asks for the device without using it: processes are forked later
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def sources() -> str:
    """Return a fingerprint of the code that the figures come from."""
    digest = hashlib.sha256()
    for folder in ("src", "benchmarks", "tests/conformance"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


# ---- Results ----


def earlier_results(device: str) -> Results:
    """Return the results of this device so far."""
    path = FOLDER / f"{device}.json"
    if path.is_file():
        results: Results = json.loads(path.read_text())
        return results
    return {"device": device, "date": time.strftime("%Y-%m-%d"), "stages": {}}


def keep(results: Results) -> None:
    """Write the results after each stage, and copy them and one file of all logs to `$OUT`."""
    path = FOLDER / f"{results['device']}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    if "OUT" in os.environ:
        out = Path(os.environ["OUT"])
        shutil.copy(path, out)
        logs = [FOLDER / f"{results['device']}-{name}.log" for name in results["stages"]]
        (out / "gpu.log").write_text(
            "\n".join(f"==== {log.name}\n{log.read_text()[-200_000:]}" for log in logs if log.is_file())
        )


if __name__ == "__main__":
    raise SystemExit(main())
