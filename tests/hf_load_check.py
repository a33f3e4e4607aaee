"""Score with an exported folder where nothing but torch and transformers is installed. Imports
nothing of rmega.

Each line of stdin is a list of {"folder", "sequences", "pad", "conversation"}; a line "answers: "
with a list of {"version", "rewards": {"1right": [...], ...}, "ids", "chat"} answers it.
"""

import json
import sys

import torch
import transformers


def main():
    transformers.logging.set_verbosity_error()
    for line in sys.stdin:
        jobs = json.loads(line)
        answers = [check_tokenizer(job) if "texts" in job else check_model(job) for job in jobs]
        print("answers: " + json.dumps(answers), flush=True)


def check_model(job):
    """The rewards of a folder's model, and what its tokenizer and its methods give."""
    config = json.load(open(job["folder"] + "/config.json", encoding="utf-8"))
    remote = "auto_map" in config
    kind = transformers.AutoModel if remote else transformers.AutoModelForSequenceClassification
    options = {"trust_remote_code": True} if remote else {}
    model = kind.from_pretrained(job["folder"], torch_dtype=torch.float32, **options).eval()
    assert model.config.num_labels == 1 and model.config.pad_token_id == job["pad"]
    rewards = {}
    for size in (1, 8):
        for side in ("right", "left"):
            out = []
            for start in range(0, len(job["sequences"]), size):
                batch = job["sequences"][start : start + size]
                longest = max(map(len, batch))
                pads = [[job["pad"]] * (longest - len(ids)) for ids in batch]
                right = side == "right"
                tokens = [
                    ids + pad if right else pad + ids for ids, pad in zip(batch, pads, strict=True)
                ]
                ones = [[1] * len(ids) for ids in batch]
                zeros = [[0] * len(pad) for pad in pads]
                mask = [
                    one + zero if right else zero + one
                    for one, zero in zip(ones, zeros, strict=True)
                ]
                with torch.no_grad():
                    answer = model(
                        input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask)
                    )
                out += answer.logits[:, 0].tolist()
            rewards[str(size) + side] = out
    result = {"version": transformers.__version__, "rewards": rewards}
    if job.get("conversation"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(job["folder"], **options)
        text = tokenizer.apply_chat_template(job["conversation"], tokenize=False)
        result["ids"] = tokenizer.encode(text, add_special_tokens=False)
        result["pad"] = tokenizer.pad_token_id
        if not remote:  # a client that renders and tokenizes with the defaults
            pipe = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
            result["pipeline"] = pipe(text, function_to_apply="none")[0]["score"]
        else:
            other = [*job["conversation"][:-1], {"role": "assistant", "content": "No."}]
            scores = model.get_scores(tokenizer, [job["conversation"], other], batch_size=2)
            assert model.rank(tokenizer, [job["conversation"], other]) == (
                [0, 1] if scores[0] >= scores[1] else [1, 0]
            )
            assert model.compare(tokenizer, job["conversation"], other) == (scores[0] > scores[1])
            result["chat"] = [model.get_score(tokenizer, job["conversation"]), *scores]
    return result


def check_tokenizer(job):
    """The tokenizer of a folder alone; JOB: {"folder", "texts", "conversation"}."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["folder"])
    assert tokenizer.is_fast
    text = tokenizer.apply_chat_template(job["conversation"], tokenize=False)
    batch = tokenizer(job["texts"], padding=True)
    return {
        "version": transformers.__version__,
        "text": text,
        "ids": [tokenizer.encode(t, add_special_tokens=False) for t in job["texts"]],
        "rendered_ids": tokenizer.encode(text),
        "default_ids": [tokenizer.encode(t) for t in job["texts"]],
        "special": sorted(set(map(str, tokenizer.all_special_tokens))),
        "pad": tokenizer.pad_token,
        "inputs": sorted(batch.keys()),
        "length": len(tokenizer),
    }


main()
