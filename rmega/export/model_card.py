"""The model card, with evaluation results in its metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from rmega.export.usage import client_duties, example_tolerance, usage

LICENSE_FIELDS = ("license", "license_name", "license_link")


def kept_comparisons(count: int, held_out: int, random: bool | None = False) -> str:
    """What an export was verified with: "16 held-out comparisons", "16 comparisons (4 held out, 12
    of the training set)", "16 comparisons of random tokens"."""
    if random:
        return f"{count} comparisons of random tokens"
    if held_out == count:
        return f"{count} held-out comparisons"
    return f"{count} comparisons ({held_out} held out, {count - held_out} of the training set)"


def write_card(
    folder: Path, name: str, recipe: dict[str, Any], base: Path, hub_name: str | None = None
) -> None:
    """``README.md`` of the export ``name``. ``base`` is the folder with the base model's own files
    (for license and base model of its card), ``hub_name`` the repository that it is written for."""
    stated = base_card(base)
    license_fields = {field: stated[field] for field in LICENSE_FIELDS if field in stated}
    results = {row.get("name"): row for row in recipe["evaluation"]}  # the last of each set
    base_model = recipe.get("base_model")
    hub_base = base_model if _is_hub_name(base_model) else stated.get("base_model")
    data = ModelCardData(
        library_name="peft" if recipe.get("adapter_of") else "transformers",
        pipeline_tag="text-classification",
        tags=["reward-model"],
        base_model=hub_base,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-classification",
                task_name="Reward modeling",
                dataset_type=str(set_name),
                dataset_name=str(set_name),
                metric_type="accuracy",
                metric_name=f"Accuracy on {row['num_pairs']} held-out pairs",
                metric_value=row["accuracy"],
            )
            for set_name, row in results.items()
        ]
        or None,
        **license_fields,
    )
    license_name = stated.get("license_name") or stated.get("license")
    what = recipe["architecture"]
    if adapter_of := recipe.get("adapter_of"):
        what = f"LoRA adapter and reward head for {what} on {adapter_of}"
    body = f"""# {name}

A reward model ({what}, {recipe["dtype"]}): it reads a conversation and gives one
number, higher for a better last reply. It was trained on differences between replies to one prompt;
the number by itself has no unit.

| | |
|---|---|
| base model | {base_model} |
| license of the base model | {license_name or license_text(base) or "not stated in its folder"} |
{_training_of(recipe)}
| reward token | {recipe["reward_token_id"]} {_code(recipe.get("reward_token"))} |
| pad token | {recipe["pad_token_id"]} {_code(recipe.get("pad_token"))} |
| rewards of held-out responses | {_spread(recipe.get("held_out_rewards"))} |

## Verification

{_verification(recipe.get("verification"))}

{_evaluation(recipe["evaluation"])}## Use

{_numbered(client_duties(recipe))}

{_examples(recipe, hub_name or f"./{name}")}## Training

{_data_list(recipe["data"])}

```json
{_training(recipe.get("config") or {})}
```

All of it, with the data's manifest, is in `reward_recipe.json`.
"""
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(folder / "README.md")


def _training_of(recipe: dict[str, Any]) -> str:
    if parts := recipe.get("average_of"):
        return f"| mean of the weights of | {', '.join(f'`{part}`' for part in parts)} |"
    comparisons = _count(recipe.get("comparisons_seen"))
    return f"| trained for | {recipe['iteration']} steps, {comparisons} comparisons |"


def _verification(result: dict[str, Any] | None) -> str:
    if result is None:
        return (
            "**Not verified**: the rewards of this folder have not been compared with those of the"
            " training."
        )
    outcome = "agree" if result["passed"] else "**DO NOT AGREE: do not use this folder**"
    reason = f" {result['reason']}" if result["reason"] else f" {result['weights']}"
    return (
        f"{result['responses']} responses of"
        f" {kept_comparisons(result['comparisons'], result['held_out'], result.get('random'))},"
        " scored by the training"
        f" code and by stock transformers {result['transformers']} from this folder: they {outcome}"
        f" (largest difference {result['largest_difference']:.3g} on rewards up to"
        f" {result['largest_reward']:.3g}, that is {result['relative_difference']:.2g}; tolerance"
        f" {result['tolerance']:.0e}).{reason}"
    )


def _evaluation(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    lines = [
        f"| {row.get('name')} | {row.get('step')} | {row['accuracy']:.4f} |"
        f" {row['accuracy_low']:.4f} to {row['accuracy_high']:.4f} | {row['num_pairs']} |"
        for row in rows
    ]
    head = ["| set | step | accuracy | 95 % interval | pairs |", "|---|---|---|---|---|"]
    return "\n".join(["## Evaluation on held-out pairs", "", *head, *lines, "", ""])


def _examples(recipe: dict[str, Any], folder: str) -> str:
    lines = []
    for title, command, code in usage(recipe, folder):
        shell = ["```bash", command, "```", ""] if command else []
        lines += [f"### {title}", "", *shell, "```python", code, "```", ""]
    if example := recipe.get("example"):
        check = "To check a client: the conversation above must become exactly these ids"
        if example.get("reward") is not None:
            check += (
                f", and its reward is {example['reward']:.5f}, give or take"
                f" {example_tolerance(recipe):.1g} in {recipe['dtype']}"
            )
        lines += [f"{check}.", "", "```", str(example["token_ids"]), "```", ""]
    return "\n".join([*lines, ""])


def base_card(base: Path) -> dict[str, str]:
    """The license fields and the base model that the base model's own card states in its metadata;
    {} for none."""
    readme = base / "README.md"
    try:
        data = (
            ModelCard.load(readme, ignore_metadata_errors=True).data if readme.is_file() else None
        )
    except Exception:  # a card that is no text, or whose metadata is no YAML
        return {}
    fields = {field: getattr(data, field, None) for field in (*LICENSE_FIELDS, "base_model")}
    return {field: value for field, value in fields.items() if isinstance(value, str) and value}


def license_text(base: Path) -> str | None:
    """The first line of the base model's LICENSE file."""
    for file in sorted(base.glob("LICENSE*")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.strip():
                return line.strip()
    return None


def _is_hub_name(name: str | None) -> bool:
    if name is None:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def _spread(rewards: dict[str, Any] | None) -> str:
    if rewards is None:
        return "not recorded"
    return f"mean {rewards['mean']:.4f}, standard deviation {rewards['std']:.4f} ({rewards['set']})"


def _count(number: Any) -> str:
    return f"{number:,}" if isinstance(number, int) else "an unknown number of"


def _code(text: Any) -> str:
    return f"`{text}`" if text else ""


def _numbered(lines: list[str]) -> str:
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))


def _data_list(data: dict[str, Any]) -> str:
    """The manifest of the data as a list, its short values only."""
    short = {
        key: value
        for key, value in data.items()
        if isinstance(value, (str, int, float, bool)) and len(str(value)) < 100
    }
    return "\n".join(f"- {key}: {value}" for key, value in short.items()) or "- no manifest"


def _training(config: dict[str, Any]) -> str:
    parts = {key: config.get(key) for key in ("loss", "optimizer", "train", "parallel")}
    return json.dumps(parts, ensure_ascii=False, indent=1)
