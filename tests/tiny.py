"""Tiny base models with real tokenizers, built on the fly: what tests train and serve in place of a downloaded base."""

from pathlib import Path
from typing import Any

from agnews_lora.adapters.families import LAYOUTS, Family
from agnews_lora.adapters.spec import ModelShape

HIDDEN_SIZE = 32
NUM_LAYERS = 2
INTERMEDIATE_SIZE = 64
MAX_TOKENS = 128
LIKE_ROBERTA = ("roberta", "xlm-roberta", "camembert")  # byte-level BPE, positions from the padding's on

SENTENCES = (
    "Ministers met in the capital to sign a treaty after weeks of talks, the embassy said on Monday.",
    "Rebels and government troops agreed a truce as voters went to the polls in the province.",
    "The striker scored twice in the second half and the champions won the final by three goals to one.",
    "Their coach praised the pitcher after the home team took the series in extra innings.",
    "Shares of the retailer fell on Tuesday as quarterly profit missed the forecasts of analysts.",
    "Oil prices rose to a record and the central bank left its interest rate at 4.5 percent.",
    "The software maker released a patch for its browser after a flaw let worms spread over the Internet.",
    "Scientists said the probe sent images of the planet's rings back to the laboratory.",
)


def tiny_shape(family: Family, num_labels: int = 4) -> ModelShape:
    """The shape of what `tiny_base` writes."""
    return ModelShape(family, HIDDEN_SIZE, NUM_LAYERS, INTERMEDIATE_SIZE, num_labels)


def tiny_config(family: Family, **changes: Any) -> Any:
    """Hugging Face's configuration of a tiny base; changes: its fields."""
    from transformers import AutoConfig

    layout = LAYOUTS[family]
    sizes = dict(zip(layout.sizes, (HIDDEN_SIZE, NUM_LAYERS, INTERMEDIATE_SIZE), strict=True))
    common = {"vocab_size": 400, "num_attention_heads": 2, "max_position_embeddings": MAX_TOKENS}
    common |= {"initializer_range": 0.2, "pad_token_id": 1 if family in LIKE_ROBERTA else 0}
    special: dict[str, Any] = {}
    if family in LIKE_ROBERTA:
        special = {"max_position_embeddings": MAX_TOKENS + 2, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    elif family == "electra":
        special = {"embedding_size": HIDDEN_SIZE // 2}
    elif family == "deberta-v2":  # as DeBERTa-v3 has them
        special = {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]}
        special |= {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
        special |= {"type_vocab_size": 0}
    elif family == "modernbert":
        special = {"local_attention": 16, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    return AutoConfig.for_model(layout.model_type, **{**sizes, **common, **special, **changes})


def tiny_base(folder: Path, family: Family, seed: int = 0, **changes: Any) -> Path:
    """Write a base model without a classifier, and its tokenizer, as the hub has them; the weights follow from `seed`.

    The weights' scale is larger than a fresh model's, so that predictions depend visibly on the text.
    """
    import torch
    from transformers import AutoModel, AutoModelForMaskedLM

    vocabulary_size = _write_tokenizer(folder, family)
    config = tiny_config(family, vocab_size=vocabulary_size, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bare = family in ("bert", "electra")
        model: torch.nn.Module = (AutoModel if bare else AutoModelForMaskedLM).from_config(config)
    model.save_pretrained(str(folder))
    return folder


def _write_tokenizer(folder: Path, family: Family) -> int:
    """Make the family's kind of tokenizer from `SENTENCES` and write its files; the size of its vocabulary.

    WordPiece's trainer numbers the pieces in another order in every process, so its vocabulary is made here.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if family not in LIKE_ROBERTA:
        special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
        normalizer, words = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
        text = normalizer.normalize_str(" ".join(SENTENCES))
        letters = sorted(set(text) - {" "})
        pieces = [*letters, *(f"##{letter}" for letter in letters)]
        pieces += sorted({word for word, _ in words.pre_tokenize_str(text)} - set(letters))
        vocabulary = {piece: number for number, piece in enumerate([*special.values(), *pieces])}
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, words
        tokenizer.decoder = decoders.WordPiece()
        processor = processors.BertProcessing
    else:
        special = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=list(special.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(SENTENCES, trainer)
        processor = processors.RobertaProcessing
    ends = [(special[name], tokenizer.token_to_id(special[name])) for name in ("sep", "cls")]
    tokenizer.post_processor = processor(*ends)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_TOKENS,
        bos_token=special["cls"],
        eos_token=special["sep"],
        **{f"{name}_token": token for name, token in special.items()},
    )
    wrapped.save_pretrained(str(folder))
    return int(tokenizer.get_vocab_size())
