"""A plan file in, the list of experts to train out: which data, from which weights, for how many windows.

    recipe = "xglm_tiny"                    # as for pretrain.py
    data = "tokens/pydocs"
    ds_config = "ds_configs/zero1_bf16.json"
    seed_model = "runs/seed"                # a run, checkpoint, logical or Hugging Face directory
    overrides = ["optimizer.learning_rate=1e-4"]
    [[rounds]]
    clusters = "clusters/tfidf4"            # or languages, typology, random, add
    total_steps = 400

A round's experts share the tokens that the dense model would see in `total_steps` steps of the recipe's batch: with
`share_by = "batch"` each takes as many steps with 1/k of the windows (as published), with "steps" 1/k of the steps.
Several rounds are HMR: each expert starts from the expert of the round before whose cluster has most of its documents.
A round with `add` trains one expert for each new language, on it and on its donor, from the donor's
expert; the other experts stay. Source: METHODS §2.6, §2.7.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from xlmega import config
from xlmega.data.indexed import IndexedTokens, open_corpus
from xlmega.data.shares import Size
from xlmega.data.windows import num_windows
from xlmega.errors import ConfigError, DataError
from xlmega.experts.assignment import clusters_by_language, num_clusters
from xlmega.experts.parts import Labels, Marks, check_labels, check_sources, labels_by_lot, labels_of_groups, overlap
from xlmega.experts.sharing import expert_mix
from xlmega.experts.told import cluster_marks
from xlmega.experts.typology import language_tree, nearest_language
from xlmega.text.vocabulary import load_vocabulary
from xlmega.training.recipe import Recipe, read_recipe
from xlmega.training.runtime import read_runtime

DENSE = "dense"


@dataclass(frozen=True)
class Round:
    """One round of experts; exactly one of clusters, languages, typology, random and add says what they are of."""

    total_steps: int
    """Steps of the dense model whose tokens the experts share."""
    clusters: str = ""
    """A folder from tools/assign_clusters.py."""
    languages: tuple[tuple[str, ...], ...] = ()
    """Groups of languages."""
    typology: int = 0
    """Number of clusters, of the data's languages by typology."""
    random: int = 0
    """Number of clusters by lot."""
    add: tuple[str, ...] = ()
    """New languages."""
    parents: tuple[int, ...] = ()
    """For each expert the one of the round before that it starts from; empty: by overlap."""

    def problems(self) -> Iterator[str]:
        kinds = [name for name in ("clusters", "languages", "typology", "random", "add") if getattr(self, name)]
        if len(kinds) != 1:
            yield f"one of clusters, languages, typology, random and add makes a round, but it has {kinds or 'none'}."
        for name in ("typology", "random"):
            if getattr(self, name) < 0:
                yield f"{name} must not be negative, but is {getattr(self, name)}."
        if self.total_steps < 1:
            yield f"total_steps must be at least 1, but is {self.total_steps}."


@dataclass(frozen=True)
class Plan:
    """What a plan file says."""

    recipe: str
    """Name in xlmega/recipes or path of a TOML file; its total_steps are the rounds' business."""
    data: str
    """A folder from tools/tokenize_corpus.py."""
    ds_config: str
    rounds: tuple[Round, ...]
    seed_model: str = ""
    """Empty: the recipe's own start."""
    overrides: tuple[str, ...] = ()
    """As pretrain.py's --set, for the dense model and all experts."""
    arguments: tuple[str, ...] = ()
    """Further options of pretrain.py, such as ["--tp", "2"]."""
    launcher: tuple[str, ...] = ()
    """What starts pretrain.py, such as ["deepspeed", "--num_gpus", "2", "--master_port", "{port}"]; empty: one process.
    {port} is a free port, another for each expert. ["python", "slurm/torchrun.py", ...] is torchrun with exit codes."""
    share_by: Literal["batch", "steps"] = "batch"
    budget: Literal["equal", "tokens"] = "equal"
    """Each expert gets as much as another, or (with share_by = "steps") in proportion to its cluster's tokens."""
    dense: bool = True
    """Train the dense baseline too, on the same total tokens."""
    cluster_token: bool = False
    """Tell the dense model and the experts each training document's cluster, by a mark in front of it, see `told`."""
    seed: int = 0
    """Of clusters by lot."""
    tree: Literal["pairs", "halves"] = "pairs"
    linkage: Literal["single", "complete", "average"] = "single"
    feature_set: str = "syntax_average"

    def problems(self) -> Iterator[str]:
        if self.budget == "tokens" and self.share_by == "batch":
            yield 'budget = "tokens" gives experts different lengths, so it needs share_by = "steps".'
        if self.seed < 0:
            yield f"seed must not be negative, but is {self.seed}."
        if self.cluster_token and len(self.rounds) > 1:
            yield "cluster_token is for one round: another has other clusters, and the dense model is told one."


@dataclass(frozen=True)
class Expert:
    """One run of pretrain.py."""

    name: str
    """Its run directory under the output: 'round-1/expert-0', or 'dense'."""
    cluster: int
    data: Path
    weights: str
    """Where it starts from: a path as given, or '' for the recipe's own start."""
    parent: str
    """The expert that must be trained first; ''."""
    total_steps: int
    batch_windows: int
    languages: Mapping[str, int]
    """Documents of each language in its cluster."""
    mix: Mapping[str, float]
    """Its `data.languages`; empty: as the recipe has them."""

    @property
    def left_out(self) -> list[str]:
        """Languages whose part of the cluster is too small for a window."""
        return [code for code in self.languages if self.mix and code not in self.mix]

    @property
    def round(self) -> str:
        return self.name.partition("/")[0]


def read_plan(path: Path) -> Plan:
    """The plan in a TOML file; all problems in one error."""
    table = config.read_toml(path)
    rounds = table.pop("rounds", [])
    if not isinstance(rounds, list) or not rounds:
        raise ConfigError(f"plan '{path}' needs at least one [[rounds]] table with total_steps and clusters.")
    built = [
        config.build(Round, one, what=f"plan '{path}', round {number}") for number, one in enumerate(rounds, start=1)
    ]

    # The rounds are built apart: a list of tables is not a type that recipes know.
    plan: Any = config.build(_PlanWithoutRounds, table, what=f"plan '{path}'")
    values = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    result = Plan(**values, rounds=tuple(built))
    problems = [f"plan '{path}': {line}" for line in result.problems()]
    if problems:
        raise ConfigError("\n  ".join(problems))
    return result


_PlanWithoutRounds = dataclasses.make_dataclass(
    "_PlanWithoutRounds",
    [
        (field.name, field.type, dataclasses.field(default=field.default))
        if field.default is not dataclasses.MISSING
        else (field.name, field.type)
        for field in dataclasses.fields(Plan)
        if field.name != "rounds"
    ],
    frozen=True,
    namespace={"__module__": __name__},
)


@dataclass(frozen=True)
class Division:
    """The clusters of one round."""

    labels: Labels
    num_clusters: int


class Resolved:
    """A plan with its data opened: clusters, parents and budgets of every round."""

    def __init__(self, plan: Plan, output: Path) -> None:
        self.plan, self.output = plan, output
        if plan.rounds[0].add or plan.rounds[0].parents:
            raise ConfigError("round 1 has nothing before it: add and parents are for later rounds.")
        self.recipe: Recipe = read_recipe(plan.recipe, [*plan.overrides, f"data.root={plan.data}"])
        windows = self.recipe.training.batch_windows
        if not isinstance(windows, int):
            raise ConfigError(
                "training.batch_windows changes during this recipe, so experts cannot share it. Give one number, with "
                'overrides = ["training.batch_windows=64"].'
            )
        self.batch_windows: int = windows
        """Of the dense model."""
        self.corpus: dict[str, IndexedTokens] = open_corpus(Path(plan.data), "train")
        new = [code for one in plan.rounds for code in one.add]
        chosen = self.recipe.data.languages or self.corpus
        for code in new:
            if code not in self.corpus:
                raise ConfigError(f"a round adds '{code}', but '{plan.data}' has {', '.join(self.corpus)}.")
        self.languages = [code for code in sorted(chosen) if code not in new]
        """Of the dense model and the rounds before anything is added."""

    @cached_property
    def divisions(self) -> list[Division]:
        """One for each round."""
        found: list[Division] = []
        for number, one in enumerate(self.plan.rounds, start=1):
            division = self._division(one, found)
            if self.plan.share_by == "batch":
                self._check_share(number, division.num_clusters)
            found.append(division)
        return found

    def _check_share(self, number: int, k: int) -> None:
        """Every expert of a round can run its part of the batch: found now, not when the rounds before are trained."""
        batch, micro = self.batch_windows, read_runtime(Path(self.plan.ds_config)).micro_batch_windows
        if batch % k:
            raise ConfigError(
                f"round {number}: training.batch_windows={batch} cannot be shared by {k} experts. Take a multiple, "
                f'such as {k * max(1, round(batch / k))}, or share_by = "steps".'
            )
        if batch // k % micro:
            raise ConfigError(
                f"round {number}: each of {k} experts has {batch // k} of training.batch_windows={batch}, which is no "
                f"multiple of the {micro} windows of a micro-batch in '{self.plan.ds_config}'. Take "
                f"training.batch_windows={k * micro * max(1, round(batch / k / micro))}, a micro-batch of "
                f'{math.gcd(batch // k, micro)}, or share_by = "steps".'
            )

    def _division(self, one: Round, before: Sequence[Division]) -> Division:
        plan = self.plan
        if one.clusters:
            labels: Labels = clusters_by_language(Path(one.clusters), "train")
            check_sources(Path(plan.data), "train", Path(one.clusters))
            known = {code: self.corpus[code] for code in self.corpus if code in labels or code in self.languages}
            check_labels(known, labels, f"'{one.clusters}'")
            kept = {
                code: labels[code] if code in self.languages else np.full(tokens.num_documents, -1, np.int64)
                for code, tokens in self.corpus.items()
            }
            return Division(kept, num_clusters(Path(one.clusters)))
        if one.random:
            known = {code: self.corpus[code] for code in self.languages}
            by_lot = labels_by_lot(known, one.random, plan.seed)
            return Division({**labels_of_groups(self.corpus, []), **by_lot}, one.random)
        if one.add:
            pairs = [(code, self.donor(code)) for code in one.add]
            # A donor may serve several languages, so these clusters overlap: each has its own labels.
            return Division({f"{code}+{donor}": np.zeros(0, np.int64) for code, donor in pairs}, len(pairs))
        groups = one.languages
        if one.typology:
            tree = language_tree(self.languages, feature_set=plan.feature_set, linkage=plan.linkage, method=plan.tree)
            groups = tree.clusters(one.typology)
        return Division(labels_of_groups(self.corpus, groups), len(groups))

    @cached_property
    def marks(self) -> Marks | None:
        """What tells a document's cluster, where the plan wants that."""
        if not self.plan.cluster_token:
            return None
        (division,) = self.divisions
        vocabulary = load_vocabulary(Path(self.plan.data) / "vocabulary")
        return Marks(np.array(cluster_marks(vocabulary, division.num_clusters)), division.labels)

    def donor(self, code: str) -> str:
        """The typologically nearest language that is trained without being added."""
        return nearest_language(code, self.languages, self.plan.feature_set)

    def labels_of(self, number: int, cluster: int) -> Labels:
        """Labels in which this expert's documents are 0 and all others -1; rounds count from 1."""
        one, division = self.plan.rounds[number - 1], self.divisions[number - 1]
        if one.add:
            code = one.add[cluster]
            return labels_of_groups(self.corpus, [(code, self.donor(code))])
        return {code: np.where(labels == cluster, 0, -1) for code, labels in division.labels.items()}

    @cached_property
    def parents(self) -> list[list[int]]:
        """For each round the expert of the round before that each expert starts from; the first round has none."""
        found: list[list[int]] = []
        for number, one in enumerate(self.plan.rounds, start=1):
            if number == 1:
                found.append([])
                continue
            above = self.divisions[self._last_whole(number) - 1]
            k = self.divisions[number - 1].num_clusters
            given = list(one.parents)
            if given and (len(given) != k or not all(0 <= p < above.num_clusters for p in given)):
                raise ConfigError(
                    f"round {number}: parents = {given}, but {k} numbers from 0 to {above.num_clusters - 1} are due."
                )
            if one.add and not given:
                given = [self._home(self.donor(code), above) for code in one.add]
            elif not given:
                given = np.argmax(overlap(self.divisions[number - 1].labels, above.labels), axis=1).tolist()
            found.append(given)
        return found

    def _last_whole(self, number: int) -> int:
        """The last round before `number` that divided all languages."""
        return max(r for r in range(1, number) if not self.plan.rounds[r - 1].add)

    def _home(self, code: str, division: Division) -> int:
        """The cluster with most of a language's documents."""
        labels = division.labels[code]
        return int(np.argmax(np.bincount(labels[labels >= 0], minlength=division.num_clusters)))

    @cached_property
    def experts(self) -> list[Expert]:
        """Every run of the plan in an order in which parents come first; the dense one is last."""
        plan, batch = self.plan, self.batch_windows
        found: list[Expert] = []
        seed = plan.seed_model
        for number, one in enumerate(plan.rounds, start=1):
            k = self.divisions[number - 1].num_clusters
            parts = [self._sizes(self.labels_of(number, cluster)) for cluster in range(k)]
            tokens = [sum(size.tokens for size in part.values()) for part in parts]
            for cluster, part in enumerate(parts):
                share = 1 / k if plan.budget == "equal" else tokens[cluster] / sum(tokens)
                steps = one.total_steps if plan.share_by == "batch" else max(1, round(one.total_steps * share))
                parent = ""
                if number > 1:
                    parent = f"round-{self._last_whole(number)}/expert-{self.parents[number - 1][cluster]}"
                mix = expert_mix(self.recipe.data, self._whole(part), part)
                if not any(size.windows for size in part.values()):
                    raise DataError(
                        f"cluster {cluster} of round {number} has less than {self.recipe.data.sequence_length + 1} "
                        "tokens of every language, which is no window. Take fewer clusters or a smaller "
                        "data.sequence_length."
                    )
                found.append(
                    Expert(
                        name=f"round-{number}/expert-{cluster}",
                        cluster=cluster,
                        data=self.output / "data" / f"round-{number}" / f"cluster-{cluster}",
                        weights=str(self.output / parent) if parent else seed,
                        parent=parent,
                        total_steps=steps,
                        batch_windows=batch // k if plan.share_by == "batch" else batch,
                        languages={code: size.documents for code, size in part.items()},
                        mix=mix,
                    )
                )
        if plan.dense:
            total = sum(one.total_steps for one in plan.rounds if not one.add)
            documents = {code: self.corpus[code].num_documents for code in self.languages}
            mix = {code: weight for code, weight in self.recipe.data.languages.items() if code in documents}
            found.append(Expert(DENSE, -1, self.output / "data" / DENSE, seed, "", total, batch, documents, mix))
        return found

    def _sizes(self, labels: Labels) -> dict[str, Size]:
        """Of each language that has documents with labels from 0."""
        found, data = {}, self.recipe.data
        for code, one in labels.items():
            if documents := int((one >= 0).sum()):
                tokens = int(np.diff(self.corpus[code].document_starts)[one >= 0].sum())
                windows = documents if data.windows == "documents" else num_windows(tokens, data.sequence_length)
                found[code] = Size(tokens, documents, windows)
        return found

    def _whole(self, part: Mapping[str, Size]) -> dict[str, Size]:
        """Of all languages that the recipe or the cluster has."""
        codes = dict.fromkeys([*(self.recipe.data.languages or self.corpus), *part])
        return self._sizes({code: np.zeros(self.corpus[code].num_documents, np.int64) for code in codes})

    def facts(self) -> dict[str, Any]:
        """What an output directory is pinned to."""
        table = dataclasses.asdict(self.plan)
        experts = [{**dataclasses.asdict(one), "data": str(one.data)} for one in self.experts]
        recipe = config.to_table(self.recipe)
        return dict(json.loads(json.dumps({"plan": table, "recipe": recipe, "experts": experts})))
