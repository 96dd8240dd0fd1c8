"""The labels of classifiers: what they are, how they are found in training data, and how values become numbers."""

from dataclasses import dataclass, replace

from ..data.columns import BadRowError, check_text
from ..errors import InputError
from ..terminal import first_of, plural
from .base import IGNORE_INDEX

# the values of `problem_type` in stock configurations
CLASSIFICATION = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"


@dataclass(frozen=True)
class Labels:
    """The labels of a classifier.

    Args:
        problem_type: CLASSIFICATION, MULTI_LABEL or REGRESSION.
        names: the names of the classes, in the order of their ids; empty for a regression.
    """

    problem_type: str
    names: tuple = ()

    @classmethod
    def from_config(cls, config):
        """Return the labels that a model was trained for."""
        if config.problem_type == REGRESSION or (config.problem_type is None and config.num_labels == 1):
            return cls(REGRESSION)
        names = tuple(config.id2label[index] for index in range(config.num_labels))
        if len(set(names)) < len(names):
            raise InputError(f"id2label of the model's config.json has a name twice: {', '.join(map(str, names))}")
        return cls(config.problem_type or CLASSIFICATION, names)

    def config_settings(self):
        """Return what the model's configuration says of the labels."""
        names = self.names or ("LABEL_0",)
        return {
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
            "problem_type": self.problem_type,
        }

    def in_order_of(self, stored):
        """Return these labels in the order of a trained head, if it has the same names."""
        return replace(self, names=stored.names) if set(stored.names) == set(self.names) else self

    def fit_head(self, stored):
        """Return whether a head that was trained for the labels `stored` can be used for these."""
        if REGRESSION in (self.problem_type, stored.problem_type):
            return self.problem_type == stored.problem_type
        return set(stored.names) in (set(self.names), {f"LABEL_{name}" for name in self.names})

    @property
    def num_labels(self):
        return len(self.names) or 1

    @property
    def is_multi_hot(self):
        """Whether a label is a list of 0 and 1, one for each class, rather than a list of names."""
        return self.problem_type == MULTI_LABEL and self.names == default_names(self.num_labels)

    def label_id(self, value, where):
        """Return the id of a class.

        Raises:
            BadRowError: the value is missing, or not one of the classes.
        """
        require_label(value, where)
        name = label_name(value, where)
        if name not in self.names and f"LABEL_{name}" in self.names:  # a class without a name of its own
            name = f"LABEL_{name}"
        if name not in self.names:
            raise BadRowError(
                f"{where}: the label {name!r} is not in the training data, which has {first_of(self.names, 10)}; name "
                "it in labels, or leave out such rows, with skip_bad_rows"
            )
        return self.names.index(name)

    def encode(self, value, where):
        """Return a label as numbers: a class id, a list of 0.0 and 1.0 for each class, or the target of a regression.

        Raises:
            BadRowError: the value is missing, or not a label of this kind.
        """
        if self.problem_type == CLASSIFICATION:
            return self.label_id(value, where)
        require_label(value, where)
        if self.problem_type == REGRESSION:
            return _target_value(value, where)
        chosen = value if isinstance(value, (list, dict)) else [value]
        if self.is_multi_hot and not isinstance(value, dict) and not all(isinstance(name, str) for name in chosen):
            if not _is_multi_hot(value) or len(value) != self.num_labels:
                raise BadRowError(
                    f"{where}: the label {value!r:.80} is not a list of {self.num_labels} numbers, 0 or 1 each"
                )
            return [float(flag) for flag in value]
        if isinstance(chosen, dict):  # one column per class
            for name, flag in chosen.items():
                if _target_value(flag, where) not in (0, 1):
                    raise BadRowError(f"{where}: column {name!r} has {flag!r:.40}; a class column holds 0 or 1")
            chosen = [name for name, flag in chosen.items() if _target_value(flag, where)]
        ids = {self.label_id(name, where) for name in chosen}
        return [float(index in ids) for index in range(self.num_labels)]


class LabelCollector:
    """Collects the label names of training data, example by example.

    Args:
        problem_type: CLASSIFICATION or MULTI_LABEL, or None to let the first label decide.
    """

    def __init__(self, problem_type):
        self.problem_type = problem_type
        self.names = {}
        self.first = None  # type and place of the first label
        self.lengths = set()  # of the lists of 0 and 1; None for lists of names

    def add(self, labels):
        """Add the labels of an example: a (value, place), or a list of them.

        Raises:
            BadRowError: a label is missing or of another type than the first one.
        """
        is_list = isinstance(labels, list)
        for value, where in labels if is_list else [labels]:
            require_label(value, where)
        self.problem_type = self.problem_type or (MULTI_LABEL if is_list else CLASSIFICATION)
        if self.problem_type == MULTI_LABEL:
            is_multi_hot = is_list and _is_multi_hot([value for value, _ in labels])
            if labels:  # an empty list may be either
                self.lengths.add(len(labels) if is_multi_hot else None)
            if is_multi_hot:  # unless other rows show that these are class numbers
                labels = [(int(value), where) for value, where in labels]
        for value, where in labels if is_list else [labels]:
            self.first = self.first or (type(value), where)
            if type(value) is not self.first[0]:
                raise BadRowError(
                    f"{where}: the label {value!r} is of another type than that of {self.first[1]}; write all labels "
                    "alike"
                )
            self.names[label_name(value, where)] = None

    def labels(self, source_name):
        """Return the [`Labels`], sorted by name; numbers by their size.

        Raises:
            InputError: there are fewer than two.
        """
        if len(self.lengths) == 1 and None not in self.lengths:
            return Labels(MULTI_LABEL, default_names(self.lengths.pop()))
        if len(self.names) < 2:
            count = plural(len(self.names), "label")
            raise InputError(f"{source_name} has {count}: there is nothing to tell apart; give data with two or more")
        order = sorted(self.names, key=lambda name: (0, int(name), "") if _is_integer(name) else (1, 0, name))
        return Labels(self.problem_type, tuple(order))


def require_label(value, where):
    if value is None or value == "":
        raise BadRowError(f"{where} has no label")


def label_name(value, where):
    """Return the name of a class, given its name or number."""
    if isinstance(value, float) or not isinstance(value, (str, int)):
        raise BadRowError(
            f"{where}: the label {value!r:.80} is not the name or number of a class; see problem_type for other labels"
        )
    return check_text(str(value), where)


def default_names(count):
    """Return the names of classes that have none of their own."""
    return tuple(f"LABEL_{index}" for index in range(count))


def _is_multi_hot(values):
    """Return whether this is a list of two or more numbers, 0 or 1 each."""
    return (
        isinstance(values, list)
        and len(values) > 1
        and all(isinstance(value, (int, float)) and value in (0, 1) for value in values)
    )


def _target_value(value, where):
    try:
        target = float(value)
    except (TypeError, ValueError, OverflowError):
        target = float("nan")
    if not abs(target) < 1e30 or target == IGNORE_INDEX:
        raise BadRowError(f"{where}: the label {value!r:.80} is not a number that a regression can predict")
    return target


def _is_integer(name):
    return name.removeprefix("-").isdecimal() and len(name) < 20
