"""The image of docker/Dockerfile, built and run as a cluster would, and its artifact against one made outside.

`python -m tests.container` needs root, Debian's packages and no registry of images: the engine comes from there, and
the base image is a minimal Debian. `--prepare` makes the base and the image, and no more;
`--cuda` builds that target too, some gigabytes, and imports its libraries.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "container"
TIKTOK = ROOT.parent / "shared" / "data" / "tiktok"
SUITE = "bookworm"  # that of the Dockerfile's own base
BASE = "gpu-init-base"
MOST_BYTES = {"cpu": 600e6}
TIKTOK_TOML = """
interactions = "tiktok/tiktok.inter"
where = "x_label == 0"
users = 9308
clusters = 3

[features]
image = "tiktok/image_feat.npy"
audio = "tiktok/audio_feat.npy"
"""
LARGE_TOML = """
interactions = "large.inter"

[features]
first = "first.npy"
second = "second.npy"
"""
COUNTED = """
import sys
from numba.core import event
from gpu_init import cli
with event.install_recorder("numba:compile") as compiled:
    code = cli.main(sys.argv[1:])
print(len(compiled.buffer), "functions were compiled", file=sys.stderr)
sys.exit(code)
"""


class Skipped(Exception):
    """This machine cannot make or run containers."""


def run(command, **options):
    done = subprocess.run(command, check=False, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}"
    return done.stdout


def timed(function):
    """Say how long a part took."""

    @functools.wraps(function)
    def wrapped(*arguments, **options):
        start = time.monotonic()
        made = function(*arguments, **options)
        about = ", ".join(one for one in arguments if isinstance(one, str))
        print(
            f"{function.__name__.replace('_', ' ')}{about and ' ' + about}: {time.monotonic() - start:.1f} s",
            flush=True,
        )
        return made

    return wrapped


# Engine, base and image.


@timed
def install():
    """The engine and debootstrap, from Debian's packages."""
    if os.geteuid() or not shutil.which("apt-get"):
        raise Skipped("root and apt-get are needed")
    if not all(map(shutil.which, ("dockerd", "/usr/bin/docker", "debootstrap"))):
        quiet = {"env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}}
        run(["apt-get", "update"], **quiet)
        apart = ("docker-cli", "docker-buildx")  # where the client and its builder are packages of their own
        known = [name for name in apart if run(["apt-cache", "search", "--names-only", f"^{name}$"])]
        run(["apt-get", "install", "--yes", "--no-install-recommends", "docker.io", "debootstrap", *known], **quiet)


@timed
def make_base():
    """The base image as a file: Debian's minimum and its Python."""
    target = BUILD / "base.tar"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            packages = "python3-venv,ca-certificates"
            run(["debootstrap", "--variant=minbase", f"--include={packages}", SUITE, folder])
            left = ("--exclude=./var/cache/apt/*", "--exclude=./var/lib/apt/lists/*", "--exclude=./dev/*")
            run(["tar", "-C", folder, *left, "-cf", target.with_suffix(".part"), "."])
        target.with_suffix(".part").rename(target)


class Engine:
    """A dockerd of our own, whose images stay in build/; without networks, which nothing here needs."""

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="gpu-init-")
        socket = f"unix://{self.folder.name}/socket"
        # /usr/bin: the client of the engine's own version; others need a plugin to build
        path = f"/usr/bin:{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "DOCKER_HOST": socket, "DOCKER_BUILDKIT": "1"}
        places = ["--data-root", BUILD / "docker", "--exec-root", f"{self.folder.name}/exec"]
        places += ["--pidfile", f"{self.folder.name}/pid", "--host", socket]
        with open(BUILD / "dockerd.log", "w") as log:
            self.process = subprocess.Popen(
                ["dockerd", *places, "--bridge=none", "--iptables=false"], stdout=log, stderr=log
            )
        for _ in range(300):
            asked = subprocess.run(
                ["/usr/bin/docker", "version"], env=self.environment, capture_output=True, check=False
            )
            if asked.returncode == 0:
                return self
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        self.__exit__()
        raise Skipped(f"dockerd does not run here: {(BUILD / 'dockerd.log').read_text().strip().splitlines()[-1:]}")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(60)
        self.folder.cleanup()

    def docker(self, *arguments, **options):
        return run(["/usr/bin/docker", *map(str, arguments)], env=self.environment, **options)

    def bytes(self, image):
        return int(self.docker("image", "inspect", "--format", "{{.Size}}", image))


def pip_configuration():
    """What pip is told on this machine, but its folders, which a build does not see; None, or the CA file it trusts."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True).stdout  # none without pip
    found = dict(re.findall(r"(?m)^[\w:]+\.([a-z-]+)='(.*)'$", listed))
    kept = {key: found[key] for key in ("index-url", "trusted-host", "proxy", "timeout") if key in found}
    remote = [url for url in found.get("extra-index-url", "").split() if not url.startswith("file:")]
    if remote:
        kept["extra-index-url"] = " ".join(remote)
    if "cert" in found:
        kept["cert"] = "/run/secrets/ca"
    return "\n".join(["[global]", *(f"{key} = {value}" for key, value in kept.items())]) + "\n", found.get("cert")


@timed
def build(target, engine):
    """The image of a target; what pip needs to know here is seen by the build alone."""
    if not engine.docker("images", "--quiet", BASE).strip():
        engine.docker("import", BUILD / "base.tar", BASE)
    configuration, ca = pip_configuration()
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
        file.write(configuration)
        file.flush()
        secrets = ["--secret", f"id=pip,src={file.name}", *(["--secret", f"id=ca,src={ca}"] if ca else [])]
        place = ["--file", ROOT / "docker" / "Dockerfile", "--target", target, "--tag", f"gpu-init:{target}"]
        engine.docker("build", "--quiet", "--network=host", "--build-arg", f"BASE_IMAGE={BASE}", *place, *secrets, ROOT)
    return engine.bytes(f"gpu-init:{target}") - engine.bytes(BASE)


# Jobs.


class Jobs:
    """Jobs in a container as a cluster runs them: no network, no root, nothing writable but the output."""

    def __init__(self, engine, folder):
        self.engine, self.folder, self.out = engine, folder, folder / "out"
        self.out.mkdir()
        self.out.chmod(0o777)

    def command(self, name, arguments, options=(), network="none"):
        limits = ["--rm", "--name", name, f"--network={network}", "--read-only", "--memory=2g", "--cap-drop=ALL"]
        data = ["--mount", f"type=bind,src={TIKTOK},dst=/data/tiktok,readonly"] if TIKTOK.is_dir() else []
        for path in [*self.folder.glob("*.toml"), *self.folder.glob("*.npy"), *self.folder.glob("*.inter")]:
            data += ["--mount", f"type=bind,src={path},dst=/data/{path.name},readonly"]
        data += ["--mount", f"type=bind,src={self.out},dst=/out"]
        return ["/usr/bin/docker", "run", *limits, *data, *options, "gpu-init:cpu", *arguments]

    def start(self, name, *arguments, network="none", entrypoint=None, **environment):
        """A container."""
        options = [f"--env={key}={value}" for key, value in environment.items()]
        options += [f"--entrypoint={entrypoint}"] if entrypoint else []
        command = self.command(name, arguments, options, network)
        return subprocess.Popen(
            command, env=self.engine.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def finished(self, name, *arguments, **options):
        process = self.start(name, *arguments, **options)
        said = process.communicate()[1]
        return process.returncode, said


def contents(folder):
    """Content of an artifact's files but the manifest, which has timings; after every one was checked."""
    from gpu_init.artifact import read

    assert read.verify(folder) == []
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def assert_same(ours, theirs):
    """Two artifacts: the same bytes, or, by other versions of the libraries, the same to rounding."""
    from gpu_init.artifact import read

    versions = [read.load(folder).manifest["backend"]["versions"] for folder in (ours, theirs)]
    if versions[0] == versions[1]:
        assert contents(ours) == contents(theirs)
        return "the same bytes"
    return f"{assert_close(ours, theirs)}, by {versions[0]} and {versions[1]}"


def assert_close(ours, theirs, tolerance=1e-5):
    """Two artifacts: the same labels, and the same vectors to rounding."""
    import numpy as np

    from gpu_init.artifact import read

    opened = [read.load(folder) for folder in (ours, theirs)]
    for name in opened[0]:
        one, other = (side[name] for side in opened)
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_allclose(one.users, other.users, rtol=tolerance, atol=tolerance)
    return "the same to rounding"


@timed
def tiktok(jobs):
    """A job by its file, a variable and a flag, in the container and outside."""
    if not TIKTOK.is_dir():
        print("skipped: TikTok, which is not beside the checkout")
        return
    (jobs.folder / "tiktok.toml").write_text(TIKTOK_TOML)
    settings = {"GPU_INIT_CLUSTERS": "8", "GPU_INIT_LOG_FORMAT": "json"}
    code, said = jobs.finished("tiktok", "run", "/data/tiktok.toml", "--out=/out/tiktok", **settings)
    assert code == 0, said
    lines = [json.loads(line) for line in said.splitlines()]
    assert {line["level"] for line in lines} == {"info"}, said
    owner = (jobs.out / "tiktok" / "manifest.json").stat().st_uid
    assert owner == 65532, owner
    (jobs.folder / "tiktok").symlink_to(TIKTOK)
    outside = [sys.executable, "-m", "gpu_init", "run", jobs.folder / "tiktok.toml", f"--out={jobs.folder / 'outside'}"]
    run(outside, env={**os.environ, **settings, "PYTHONPATH": str(ROOT)})
    print("TikTok, in the container and outside:", assert_same(jobs.out / "tiktok", jobs.folder / "outside"))


@timed
def compiles_nothing(jobs):
    """The image brings the machine code of all kernels; the vectors are those of this machine's own to rounding."""
    arguments = ["run", "/data/large.toml", "--out=/out/compiled"]
    code, said = jobs.finished("compiled", "-c", COUNTED, *arguments, entrypoint="python", GPU_INIT_KERNELS="numba")
    assert code == 0, said
    assert "0 functions were compiled" in said, said
    assert contents(jobs.out / "whole") == contents(jobs.out / "compiled")
    command = [sys.executable, "-m", "gpu_init", "run", jobs.folder / "large.toml", f"--out={jobs.folder / 'here'}"]
    run(command, env={**os.environ, "GPU_INIT_KERNELS": "numba", "PYTHONPATH": str(ROOT)})
    print("in the container and outside:", assert_close(jobs.out / "compiled", jobs.folder / "here", 1e-6))


@timed
def wrong_input(jobs):
    """Exit code 2, a line or two, and nothing left behind."""
    code, said = jobs.finished("wrong", "run", "/data/large.toml", "--out=/out/wrong", "--features=a=/data/none.npy")
    assert code == 2, (code, said)
    assert "/data/none.npy" in said, said
    assert len(re.search("^gpu-init: .*", said, re.MULTILINE | re.DOTALL)[0].splitlines()) <= 2, said
    assert not list(jobs.out.glob("wrong*"))


@timed
def stopped_and_resumed(jobs):
    """SIGTERM while the second modality is written, then --resume: the bytes of a run that nobody stopped."""
    arguments, kernels = ["run", "/data/large.toml", "--log-format=json"], {"GPU_INIT_KERNELS": "numba"}
    code, said = jobs.finished("whole", *arguments, "--out=/out/whole", **kernels)
    assert code == 0, said
    process = jobs.start("stopped", *arguments, "--out=/out/stopped", "--resume", **kernels)
    for line in process.stderr:
        event = json.loads(line)
        if (event["event"], event.get("step")) == ("step_started", "write second"):
            break
    start = time.monotonic()
    jobs.engine.docker("kill", "--signal=TERM", "stopped")
    said = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM, (process.returncode, said)
    assert time.monotonic() - start < 10
    assert "--resume" in json.loads(said.splitlines()[-1])["message"], said
    assert not (jobs.out / "stopped").exists()
    code, said = jobs.finished("resumed", *arguments, "--out=/out/stopped", "--resume", **kernels)
    assert code == 0, said
    assert "going on with the unfinished run" in said, said
    assert "cluster first" not in said, said
    assert contents(jobs.out / "whole") == contents(jobs.out / "stopped")


@timed
def cluster(jobs):
    """A scheduler and two workers, of which one is killed on the way: the artifact of one process."""
    here = "tcp://127.0.0.1:8786"  # all share the scheduler's network, which has no more than that
    commands = {
        "scheduler": ["dask", "scheduler", "--host=127.0.0.1", "--no-dashboard"],
        **{
            name: ["dask", "worker", here, "--nthreads=1", "--no-dashboard", "--local-directory=/cache"]
            for name in ("one", "other")
        },
    }
    for name, (program, *arguments) in commands.items():
        options = [f"--entrypoint={program}", "--detach", "--tmpfs=/tmp", "--tmpfs=/cache:mode=1777"]
        network = "none" if name == "scheduler" else "container:scheduler"
        run(jobs.command(name, arguments, options, network=network), env=jobs.engine.environment)
    settings = {"GPU_INIT_SCHEDULER": here, "GPU_INIT_LOG_FORMAT": "json", "GPU_INIT_KERNELS": "numba"}
    process = jobs.start(
        "job", "run", "/data/large.toml", "--out=/out/cluster", network="container:scheduler", **settings
    )
    said = []
    for line in process.stderr:
        said.append(line)
        event = json.loads(line)
        if (event["event"], event.get("step")) == ("step_started", "write first"):
            jobs.engine.docker("kill", "one")
    assert process.wait() == 0, said
    for name in ("other", "scheduler"):
        jobs.engine.docker("kill", name)
    workers = [json.loads(line) for line in said if "2 workers" in line]
    assert workers, said
    print("over two workers, one killed, and in one process:", assert_close(jobs.out / "cluster", jobs.out / "whole"))


def make_large(folder, users=150_000, items=400, width=256):
    """Data of a job that writes for a second or so, in groups that K-means finds at once."""
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(8)
    ids = np.repeat(np.arange(users), 3)
    chosen = 8 * rng.integers(0, items // 8, len(ids)) + ids % 8
    pd.DataFrame({"userID": ids, "itemID": chosen}).to_csv(folder / "large.inter", sep="\t", index=False)
    for name in ("first", "second"):
        values = rng.normal(size=(items, width)) + 3 * np.eye(8, width)[np.arange(items) % 8]
        np.save(folder / f"{name}.npy", values.astype(np.float16))
    (folder / "large.toml").write_text(LARGE_TOML)


def check(engine, cuda):
    """Everything above."""
    for target in ("cpu", "cuda") if cuda else ("cpu",):
        size = build(target, engine)
        print(f"gpu-init:{target}: {size / 1e6:.0f} MB above its base of {engine.bytes(BASE) / 1e6:.0f} MB")
        assert size < MOST_BYTES.get(target, float("inf")), size
    if cuda:  # the folder of CuPy's kernels is made as it is imported
        program = ["--tmpfs=/cache", "--env=HOME=/cache", "--entrypoint=python", "gpu-init:cuda", "-c"]
        engine.docker("run", "--rm", "--network=none", "--read-only", *program, "import cupy, cudf, cuml")
    with tempfile.TemporaryDirectory() as folder:
        jobs = Jobs(engine, Path(folder))
        make_large(jobs.folder)
        for part in (tiktok, stopped_and_resumed, cluster, compiles_nothing, wrong_input):
            part(jobs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--cuda", action="store_true")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that dockerd ends too
    try:
        install()
        make_base()
        with Engine() as engine:
            if given.prepare:
                build("cpu", engine)
            else:
                check(engine, given.cuda)
    except Skipped as reason:
        print(f"skipped: no containers on this machine: {reason}")


if __name__ == "__main__":
    main()
