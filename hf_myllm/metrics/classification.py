"""What classifiers and regressions are judged by, for the library `evaluate`, by scikit-learn and SciPy.

Loaded by its path, so that nothing is asked of the Hub. The configuration's name is the kind of the labels.
"""

import datasets
import evaluate
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error


class Classification(evaluate.Metric):
    """single_label_classification: accuracy, f1_macro, f1_micro, matthews; binary: the same, and f1, of class 1;
    multi_label_classification: accuracy (all of a row right), f1_macro, f1_micro; regression: mse, pearson, spearman.
    """

    def _info(self):
        single = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        several = {name: datasets.Sequence(datasets.Value("float32")) for name in single}
        numbers = {name: datasets.Value("float32") for name in single}
        features = {"multi_label_classification": several, "regression": numbers}.get(self.config_name, single)
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions, references):
        if self.config_name == "regression":
            varied = len(set(predictions)) > 1 and len(set(references)) > 1  # or there is no correlation to speak of
            return {
                "mse": float(mean_squared_error(references, predictions)),
                "pearson": float(pearsonr(references, predictions)[0]) if varied else 0.0,
                "spearman": float(spearmanr(references, predictions)[0]) if varied else 0.0,
            }
        found = {"accuracy": float(accuracy_score(references, predictions))}
        for average in ("macro", "micro"):
            found[f"f1_{average}"] = float(f1_score(references, predictions, average=average, zero_division=0))
        if self.config_name != "multi_label_classification":
            found["matthews"] = float(matthews_corrcoef(references, predictions))
            if self.config_name == "binary":
                found["f1"] = float(f1_score(references, predictions, zero_division=0))
        return found
