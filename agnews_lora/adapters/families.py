"""Families of encoders: where their matrices lie in Hugging Face's classes, and the layers of their classifiers.

Pure data: the budget is counted from this table and the sizes in a base's `config.json`, without torch. The paths are
those of each family's `…ForSequenceClassification`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

Family = Literal[
    "bert",
    "bert-no-pooler",
    "roberta",
    "xlm-roberta",
    "camembert",
    "electra",
    "distilbert",
    "deberta-v2",
    "modernbert",
]

# The roles of the matrices in an encoder layer.
QUERY: Final = "query"
KEY: Final = "key"
VALUE: Final = "value"
ATTENTION_OUTPUT: Final = "attention_output"
FFN_IN: Final = "ffn_in"
FFN_OUT: Final = "ffn_out"

# Fields of `ModelShape`, which the shapes of a classifier's tensors are given in.
_HIDDEN: Final = "hidden_size"
_LABELS: Final = "num_labels"

Sizes = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """A family's modules.

    Args:
        model_type: in `config.json`.
        encoder: attribute of the encoder in the classification model, and prefix of its tensors there.
        layers: path of the encoder's layers below it.
        modules: {role: path below a layer}; full paths, since a bare `output.dense` is also the end of
            `attention.output.dense`. Roles that share a path are one fused matrix.
        stacked: {path: how many matrices lie one below the other in it}, where more than one.
        head: {name: shape} of the classifier's tensors, sizes by their names in `ModelShape`.
        last_layer: path of the classifier's last layer.
        activation: between the classifier's two layers.
        saved: modules of the head that PEFT does not save by itself.
        sizes: keys of hidden size, number of layers and intermediate size in `config.json`.
        dropouts: keys of every dropout in `config.json`.
        required: {key in `config.json`: the only value that is computed and counted}; an absent key is that value.
        ffn_activation: key in `config.json` of the activation inside the feed-forward block.
        counts_from_padding: whether the first position is the one behind `pad_token_id`, and tokens of that id have no
            position of their own.
        multilora: whether engine multilora computes this family.
        note: said to the user of such a base.
    """

    model_type: str
    encoder: str
    head: Mapping[str, Sizes]
    last_layer: str
    modules: Mapping[str, str]
    layers: str = "encoder.layer"
    stacked: Mapping[str, int] = field(default_factory=dict)
    activation: Literal["tanh", "gelu", "relu"] = "tanh"
    saved: tuple[str, ...] = ()
    sizes: tuple[str, str, str] = ("hidden_size", "num_hidden_layers", "intermediate_size")
    dropouts: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    required: Mapping[str, Any] = field(default_factory=dict)
    ffn_activation: str = "hidden_act"
    counts_from_padding: bool = False
    multilora: bool = True
    note: str = ""

    def module_path(self, layer: int, module: str) -> str:
        """Path of a module below the classification model. module: its path below a layer."""
        return f"{self.encoder}.{self.layers}.{layer}.{module}"

    def is_frozen(self, tensor: str, head: str) -> bool:
        """Tell whether a tensor of this name, PEFT's or the model's, belongs to the part of the head that is frozen."""
        name = tensor.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
        return head == "out_proj" and name in self.head and not name.startswith(f"{self.last_layer}.")


def _linear(path: str, out_features: str, in_features: str = _HIDDEN) -> dict[str, Sizes]:
    return {f"{path}.weight": (out_features, in_features), f"{path}.bias": (out_features,)}


_BERT_MODULES: Final = {
    QUERY: "attention.self.query",
    KEY: "attention.self.key",
    VALUE: "attention.self.value",
    ATTENTION_OUTPUT: "attention.output.dense",
    FFN_IN: "intermediate.dense",
    FFN_OUT: "output.dense",
}
_DISTILBERT_MODULES: Final = {
    QUERY: "attention.q_lin",
    KEY: "attention.k_lin",
    VALUE: "attention.v_lin",
    ATTENTION_OUTPUT: "attention.out_lin",
    FFN_IN: "ffn.lin1",
    FFN_OUT: "ffn.lin2",
}
_DEBERTA_MODULES: Final = _BERT_MODULES | {
    QUERY: "attention.self.query_proj",
    KEY: "attention.self.key_proj",
    VALUE: "attention.self.value_proj",
}
_MODERNBERT_MODULES: Final = {
    QUERY: "attn.Wqkv",
    KEY: "attn.Wqkv",
    VALUE: "attn.Wqkv",
    ATTENTION_OUTPUT: "attn.Wo",
    FFN_IN: "mlp.Wi",  # gate and input of the gated unit, one below the other
    FFN_OUT: "mlp.Wo",
}

_ONE_LAYER: Final = _linear("classifier", _LABELS)
_TWO_LAYERS: Final = _linear("classifier.dense", _HIDDEN) | _linear("classifier.out_proj", _LABELS)
# transformers 5 computes relative_key and relative_key_query no longer, and trains as if they were absolute.
_ABSOLUTE: Final = {"position_embedding_type": "absolute", "is_decoder": False}


def _bert(head: Mapping[str, Sizes], saved: tuple[str, ...] = (), note: str = "") -> Layout:
    return Layout("bert", "bert", head, "classifier", _BERT_MODULES, saved=saved, required=_ABSOLUTE, note=note)


def _roberta(model_type: str, encoder: str = "roberta", activation: Literal["tanh", "gelu"] = "tanh") -> Layout:
    return Layout(
        model_type,
        encoder,
        _TWO_LAYERS,
        "classifier.out_proj",
        _BERT_MODULES,
        activation=activation,
        required=_ABSOLUTE,
        counts_from_padding=encoder == "roberta",
    )


LAYOUTS: Final[Mapping[str, Layout]] = MappingProxyType(
    {
        "bert": _bert(_ONE_LAYER),
        # Weights that a masked language model left: the pooler is a fresh layer of the head, as RoBERTa's `dense` is.
        "bert-no-pooler": _bert(
            _linear("bert.pooler.dense", _HIDDEN) | _ONE_LAYER,
            saved=("pooler",),
            note="its weights have no pooler: one is drawn from each trial's seed, as the first layer of the head",
        ),
        "roberta": _roberta("roberta"),
        "xlm-roberta": _roberta("xlm-roberta"),
        "camembert": _roberta("camembert"),
        "electra": _roberta("electra", "electra", "gelu"),
        "distilbert": Layout(
            "distilbert",
            "distilbert",
            _linear("pre_classifier", _HIDDEN) | _ONE_LAYER,
            "classifier",
            _DISTILBERT_MODULES,
            layers="transformer.layer",
            activation="relu",
            saved=("pre_classifier",),
            sizes=("dim", "n_layers", "hidden_dim"),
            dropouts=("dropout", "attention_dropout", "seq_classif_dropout"),
            ffn_activation="activation",
        ),
        "deberta-v2": Layout(
            "deberta-v2",
            "deberta",
            _linear("pooler.dense", _HIDDEN) | _ONE_LAYER,
            "classifier",
            _DEBERTA_MODULES,
            activation="gelu",
            saved=("pooler",),
            dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout", "cls_dropout"),
            multilora=False,
        ),
        "modernbert": Layout(
            "modernbert",
            "model",
            {"head.dense.weight": (_HIDDEN, _HIDDEN), "head.norm.weight": (_HIDDEN,)} | _ONE_LAYER,
            "classifier",
            _MODERNBERT_MODULES,
            layers="layers",
            stacked={"attn.Wqkv": 3, "mlp.Wi": 2},
            activation="gelu",
            saved=("head",),
            dropouts=("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout"),
            required={"classifier_bias": False, "norm_bias": False},
            multilora=False,
        ),
    }
)
MODEL_TYPES: Final = tuple(dict.fromkeys(layout.model_type for layout in LAYOUTS.values()))


def unknown_to_multilora(family: Family, config: Mapping[str, Any], base_dropout: float) -> str | None:
    """Say what engine multilora does not compute of a base and its training, or None where it computes all.

    Args:
        config: the contents of `config.json`.
        base_dropout: dropout inside the base.
    """
    layout = LAYOUTS[family]
    if not layout.multilora:
        return f"multilora does not compute model_type {layout.model_type!r}"
    if (activation := config.get(layout.ffn_activation, "gelu")) != "gelu":
        return f"multilora does not compute {layout.ffn_activation} {activation!r}, but 'gelu' only"
    if base_dropout > 0:
        return f"multilora has no dropout inside the base, but base_dropout is {base_dropout}"
    return None
