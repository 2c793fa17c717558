"""The trained spans of an encoded conversation, as texts."""

from phoque.data.chat_template import IGNORE_INDEX, ChatTemplate, EncodedChat


def trained_texts(chat: ChatTemplate, encoded: EncodedChat) -> list[str]:
    """The runs of labeled tokens, decoded."""
    runs, run = [], []
    for token, label in zip(encoded.ids, encoded.labels, strict=True):
        if label == IGNORE_INDEX:
            runs, run = ([*runs, run] if run else runs), []
        else:
            assert token == label
            run.append(token)
    return [chat.tokenizer.decode(r) for r in ([*runs, run] if run else runs)]
