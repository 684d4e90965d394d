"""What docker/ says, where there is no engine to run it; tests/container.py builds and runs the images."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from gpu_init import config
from gpu_init.settings import PREFIX

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
EXTRAS = {"cpu": ("dask", "s3"), "cuda": ("cuda12", "dask-cuda", "s3")}

yaml = pytest.importorskip("yaml")


def documents():
    return list(yaml.safe_load_all((DOCKER / "job.yaml").read_text(encoding="utf-8")))


def pod(document):
    spec = document["spec"]["jobTemplate"]["spec"] if document["kind"] == "CronJob" else document["spec"]
    return spec["template"]["spec"]


def composed(name):
    return yaml.safe_load((DOCKER / name).read_text(encoding="utf-8"))["services"]


@pytest.mark.parametrize("version", ["1.29", "1.34", "1.37"])
def test_the_manifests_are_what_kubernetes_takes(version):
    kubernetes = pytest.importorskip("kubernetes_validate")
    for document in documents():
        kubernetes.validate(document, version, strict=True)
        pod(document)["containers"][0]["image"] = 1
        with pytest.raises(kubernetes.ValidationError):
            kubernetes.validate(document, version, strict=True)


def test_every_night_runs_what_runs_first():
    job, nightly = documents()
    assert (job["kind"], nightly["kind"]) == ("Job", "CronJob")
    assert nightly["spec"]["jobTemplate"]["spec"] == job["spec"]
    assert nightly["spec"]["concurrencyPolicy"] == "Forbid"


def test_what_is_retried_and_what_is_not():
    spec = documents()[0]["spec"]
    assert spec["podReplacementPolicy"] == "Failed"
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # as podFailurePolicy needs it
    assert "--resume" in pod(documents()[0])["containers"][0]["args"]
    failing = [rule for rule in spec["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    assert [rule["onExitCodes"] for rule in failing] == [{"operator": "In", "values": [2]}]


def test_variables_are_keys_of_a_job_or_stand_before_their_use():
    known = {key.variable for key in config.KEYS}
    said = []
    for one in pod(documents()[0])["containers"][0]["env"]:
        assert one["name"] in known or not one["name"].startswith(PREFIX)
        assert set(re.findall(r"\$\((\w+)\)", one.get("value", ""))) <= set(said)
        said.append(one["name"])
    for services in map(composed, ("compose.yaml", "cluster.yaml")):
        assert {name for one in services.values() for name in one.get("environment", {})} <= known


def test_images_and_user_are_those_of_the_dockerfile():
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^FROM runtime AS (\w+)$", text, re.MULTILINE))
    assert targets == set(EXTRAS)
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["65532:65532"] * len(targets)
    assert pod(documents()[0])["securityContext"]["runAsUser"] == 65532
    compose = composed("compose.yaml")
    assert {name: one["build"]["target"] for name, one in compose.items()} == {name: name for name in targets}
    assert {one["image"] for one in compose.values()} == {f"gpu-init:{name}" for name in targets}


def test_processes_of_a_cluster_find_each_other_and_are_shut_off():
    cluster = composed("cluster.yaml")
    scheduler = cluster["job"]["environment"]["GPU_INIT_SCHEDULER"]
    assert scheduler == cluster["worker"]["entrypoint"][-1] == "tcp://scheduler:8786"
    assert cluster["scheduler"]["command"][:2] == ["--port", "8786"]
    assert cluster["job"]["volumes"] == cluster["worker"]["volumes"]  # as they share the inputs and the output
    for one in cluster.values():
        assert (one["image"], one["read_only"], one["cap_drop"], one["user"]) == (
            "gpu-init:cpu",
            True,
            ["ALL"],
            composed("compose.yaml")["cpu"]["user"],
        )


@pytest.mark.parametrize("target", EXTRAS)
def test_pins_are_exact_and_of_all_that_the_project_asks_for(target):
    lines = (DOCKER / f"requirements-{target}.txt").read_text(encoding="utf-8").splitlines()[1:]
    pins = dict(line.split("==") for line in lines)
    pins = {name.replace("_", "-"): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(one for extra in EXTRAS[target] for one in extras[extra])]
    for requirement in map(Requirement, wanted):
        if requirement.name == project["name"]:
            wanted += [one for extra in requirement.extras for one in extras[extra]]
    for requirement in map(Requirement, wanted):
        if requirement.name == project["name"]:
            continue
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_nothing_of_this_machine_or_its_mirrors_is_written_down():
    for path in [ROOT / ".dockerignore", *DOCKER.iterdir()]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://|index-url|find-links", text), path
