"""What a cluster can have, read off its file, and what is wrong with a file that is none."""

from pathlib import Path

import pytest

from orchestrator.clusters import cluster as clusters
from orchestrator.clusters.cluster import Cluster, find_cluster_of_head, read_cluster
from orchestrator.planning.place import Node
from workers.config import Mistake

CLUSTER = """
cluster_name: test
max_workers: 3
provider: {type: aws, region: us-west-2}
head_node_type: head
available_node_types:
  head:
    resources: {CPU: 0}
    node_config: {InstanceType: m7i.xlarge}
  small:
    resources: {CPU: 8, GPU: 1}
    node_config: {InstanceType: g5.2xlarge, InstanceMarketOptions: {MarketType: spot}}
  big:
    resources: {CPU: 96, GPU: 8}
    max_workers: 1
    node_config: {InstanceType: p4d.24xlarge}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER)
    return path


def test_all_nodes_that_there_can_be_at_once(file: Path) -> None:
    cluster = read_cluster(file)
    assert cluster.nodes() == [Node(0, 0), Node(96, 8), Node(8, 1), Node(8, 1)]  # 3 besides the head, the biggest first
    assert [(kind.instance, kind.spot) for kind in cluster.types] == [
        ("m7i.xlarge", False), ("g5.2xlarge", True), ("p4d.24xlarge", False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (CLUSTER, "just text", "not a cluster file"),
        (CLUSTER, "name: beta_schedule\ndata: {source: digits}", "it has name, data"),
        (CLUSTER, "a: [", "not valid YAML"),
        ("head_node_type: head", "head_node_type: haed", "did you mean 'head'?"),
        ("{CPU: 8, GPU: 1}", "{}", "available_node_types.small.resources: {} does not say"),
        ("{CPU: 8, GPU: 1}", "{CPU: eight}", "available_node_types.small.resources"),
        ("max_workers: 1", "max_workers: some", "available_node_types.big.max_workers: 'some'"),
        ("max_workers: 3", "max_workers: -3", "max_workers: -3"),
    ],
)
def test_a_file_that_is_none_is_refused_in_words(file: Path, old: str, new: str, expected: str) -> None:
    file.write_text(CLUSTER.replace(old, new))
    with pytest.raises(Mistake, match="--cluster") as mistake:
        read_cluster(file)
    assert expected in str(mistake.value)


def test_all_mistakes_at_once(file: Path) -> None:
    file.write_text(CLUSTER.replace("{CPU: 8, GPU: 1}", "{}").replace("type: head", "type: haed"))
    with pytest.raises(Mistake) as mistake:
        read_cluster(file)
    assert "haed" in str(mistake.value) and "small" in str(mistake.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match="cannot be read"):
        read_cluster(tmp_path / "nowhere.yaml")


def test_the_head_knows_its_cluster_by_the_copy_that_ray_leaves(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "ON_THE_HEAD", file)
    assert isinstance(find_cluster_of_head(), Cluster)
    file.write_text("provider: {type: local, head_ip: 10.0.0.1}")  # machines that one has: those there are, are all
    assert find_cluster_of_head() is None
    file.unlink()
    assert find_cluster_of_head() is None


@pytest.mark.parametrize(
    "config",
    [
        "{InstanceType: 5}",
        "{machineType: [a]}",
        "text",
        "[1]",
        "{InstanceMarketOptions: spot}",
        "{InstanceMarketOptions: 1}",
    ],
)
def test_a_machine_that_is_none_is_a_mistake(tmp_path: Path, config: str) -> None:
    (file := tmp_path / "cluster.yaml").write_text(
        f"head_node_type: head\navailable_node_types:\n  head: {{resources: {{CPU: 4}}, node_config: {config}}}\n"
    )
    with pytest.raises(Mistake, match=r"available_node_types\.head\.node_config"):
        read_cluster(file)


@pytest.mark.parametrize("head", ["[head]", "{head: 1}", "null", "5"])
def test_a_head_that_is_no_name_is_a_mistake(tmp_path: Path, head: str) -> None:
    (file := tmp_path / "cluster.yaml").write_text(
        f"head_node_type: {head}\navailable_node_types:\n  head: {{resources: {{CPU: 4}}}}\n"
    )
    with pytest.raises(Mistake, match=r"head_node_type: .* is none of available_node_types"):
        read_cluster(file)
