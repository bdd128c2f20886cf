"""Released rules of benchmarks, transcribed from their published code into plain loops over plain records; no code of ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def pope_no(text: str) -> bool:
    """RUCAIBox/POPE 3df3ba1 and R-Bench d9d73c0."""
    if text.find(".") != -1:
        text = text.split(".")[0]
    words = text.replace(",", "").split(" ")
    return "No" in words or "not" in words or "no" in words


def counts(pairs: Sequence[tuple[bool, bool]]) -> tuple[int, int, int, int]:
    """Return TP, FP, TN, FN of (said yes, is yes)."""
    tp = fp = tn = fn = 0
    for answer, true in pairs:
        if answer:
            tp, fp = tp + true, fp + (not true)
        else:
            fn, tn = fn + true, tn + (not true)
    return tp, fp, tn, fn


def r_bench(rows: Sequence[tuple[str, str | None]]) -> list[float]:
    """Accuracy, precision, recall, F1, yes ratio of (text, label)."""
    pairs = [(not pope_no(t), not (label and "no" in label.lower())) for t, label in rows]
    tp, fp, tn, fn = counts(pairs)
    precision, recall = tp / (tp + fp + 0.00001), tp / (tp + fn + 0.00001)
    f1 = 2 * precision * recall / (precision + recall + 0.00001)
    return [(tp + tn) / len(rows), precision, recall, f1, (tp + fp) / len(rows)]


def naturalbench(texts: Sequence[str], types: Sequence[str]) -> dict[str, float]:
    """Baiqi-Li/NaturalBench 9967605: texts in fours."""

    def extract(text: str, kind: str) -> int:
        def position(word: str) -> int:
            match = re.search(r"\b" + word + r"\b", text, re.IGNORECASE)
            return -1 if match is None else match.start()

        a, b = (position("yes"), position("no")) if kind == "yes_no" else (position("A"), position("B"))
        if a == -1 and b == -1:
            return -1
        if a != -1 and b != -1:
            return 1 if a < b else 0
        return 0 if a == -1 else 1

    q = i = n = g = 0
    for start in range(0, len(texts), 4):
        r = [extract(texts[start + k], types[start + k]) for k in range(4)]
        question = (r[0] == 1 and r[1] == 0) + (r[3] == 1 and r[2] == 0)
        image = (r[0] == 1 and r[2] == 0) + (r[3] == 1 and r[1] == 0)
        q, i, g = q + question, i + image, g + (question == 2 and image == 2)
        n += (r[0] == 1) + (r[1] == 0) + (r[2] == 0) + (r[3] == 1)
    groups = len(texts) // 4
    return {"Q_Acc": q / (2 * groups), "I_Acc": i / (2 * groups), "Acc": n / (4 * groups), "G_Acc": g / groups}


def reefknot_yes_no(rows: Sequence[Row]) -> tuple[float, float]:
    """Accuracy and share of yes of single answers."""
    right = yes = 0
    for row in rows:
        response = "yes" if "yes" in row["response"].strip().lower() else "no"
        yes += response == "yes"
        right += response == row["label"].strip().lower()
    return right / len(rows), yes / len(rows)


def reefknot_pairs(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Share of right first answers, right second answers, and pairs with both."""
    first = second = both = 0
    for k in range(0, len(rows), 2):
        a, b = rows[k], rows[k + 1]
        first_right = ("yes" if "yes" in a["response"].strip().lower() else "no") == a["label"].strip().lower()
        second_right = ("no" if "no" in b["response"].strip().lower() else "yes") == b["label"].strip().lower()
        first, second, both = first + first_right, second + second_right, both + (first_right and second_right)
    return first / (len(rows) / 2), second / (len(rows) / 2), both / (len(rows) / 2)


def reefknot_choice(rows: Sequence[Row]) -> float:
    return sum(bool(r["response"]) and r["response"][0].upper() == r["label"].upper() for r in rows) / len(rows)


def hallusion(data: Sequence[Row]) -> dict[str, float]:
    """tianyi-lab/HallusionBench 744007c: records with ``check`` and ``same`` as texts."""
    for r in data:
        supplement = r["category"] == "VS" and int(r["figure_id"]) == 0
        r["ok"] = 1 if r["check"] == "1" or (supplement and r["check"] == "2") else 0

    def key(r: Row, *names: str) -> str:
        return "_".join(str(r[n]) for n in names)

    def shares(rows: Sequence[Row], *names: str) -> tuple[int, int, int]:
        table: dict[str, list[int]] = {}
        for r in rows:
            table.setdefault(key(r, *names), []).append(r["ok"])
        values = list(table.values())
        right = sum(sum(v) == len(v) for v in values)
        wrong = sum(sum(v) == 0 for v in values)
        return right, wrong, len(values)

    pair = ("category", "subcategory", "set_id", "question_id")
    original = {key(r, *pair): r["check"] for r in data if str(r["figure_id"]) == "0"}
    lh = vi = mixed = 0
    for r in data:
        a = (0, 0)
        check, first, vd = r["check"], original[key(r, *pair)], r["category"] == "VD"
        if str(r["figure_id"]) == "0":
            if vd and check in {"0", "2"}:
                a = (0, 1)
            elif not vd and check == "0":
                a = (1, 0)
        elif vd:
            if first == "1" and check == "0":
                a = (1, 1) if r["same"] == "1" else (0, 1)
            elif check in {"0", "2"}:
                a = (0, 1)
        elif first == "0":
            if check == "0":
                a = (1, 0) if r["same"] == "1" else (1, 1)
            elif check == "2":
                a = (1, 1)
        elif first == "2":
            if check in {"0", "2"}:
                a = (0, 1)
        elif check == "2":
            a = (0, 1)
        elif check == "0":
            a = (1, 0) if r["visual_input"] == "2" and r["same"] == "1" else (0, 1)
        lh, vi, mixed = lh + (a == (1, 0)), vi + (a == (0, 1)), mixed + (a == (1, 1))
    errors = lh + vi + mixed
    pairs = shares(data, *pair)
    easy = shares([r for r in data if r["visual_input"] != "2"], *pair)
    hard = shares([r for r in data if r["visual_input"] == "2"], *pair)
    with_image = [r for r in data if not (r["category"] == "VS" and str(r["figure_id"]) == "0")]
    figures = shares(with_image, "category", "subcategory", "set_id", "figure_id")
    answer = [int(r["ok"] == int(r["gt_answer"])) for r in data]
    truth = [int(r["gt_answer"]) for r in data]
    bad = [int(r["gt_answer"]) for r in data if r["ok"] == 0]
    return {
        "accuracy": sum(r["ok"] for r in data) / len(data),
        "pair_accuracy": pairs[0] / pairs[2],
        "figure_accuracy": figures[0] / figures[2],
        "figure_wrong": figures[1] / figures[2],
        "figure_inconsistent": (figures[2] - figures[0] - figures[1]) / figures[2],
        "easy_accuracy": easy[0] / easy[2],
        "hard_accuracy": hard[0] / hard[2],
        "LH": lh / errors,
        "VI": vi / errors,
        "Mixed": mixed / errors,
        "yes_bias": sum(answer) / len(answer) - sum(truth) / len(truth),
        "false_yes_of_wrong": (len(bad) - sum(bad)) / len(bad),
    }


def amber_generative(
    inference: Sequence[tuple[list[str], Row]],
    association: dict[str, list[str]],
    safe_words: Sequence[str],
    similar: Any,
) -> dict[str, float]:
    """junyangwang0410/AMBER 534babf: (nouns, annotation) pairs; returns the printed percentages."""
    vocabulary: list[str] = []
    for word in association:
        vocabulary.append(word)
        vocabulary.extend(association[word])
    m = dict.fromkeys(("chair", "cover", "cog", "good"), 0)
    n = dict.fromkeys(("chair", "cover", "cog", "good"), 0.001)
    for nouns, truth in inference:
        nouns = [noun for noun in nouns if noun in vocabulary]
        lists = {}
        for name in ("truth", "hallu"):
            words: list[str] = []
            marks: list[int] = []
            for place, word in enumerate(truth[name]):
                words += association[word]
                marks += [place] * len(association[word])
            words += truth[name]
            marks += [0] * len(truth[name])
            lists[name] = (words, marks, len(truth[name]))

        def mark(name: str, j: int, lists: Any = lists) -> None:
            _, marks, size = lists[name]
            if j < len(marks) - size:
                marks[marks[j] + len(marks) - size] = 1
            else:
                marks[j] = 1

        bad = 0
        for noun in nouns:
            if noun in safe_words:
                continue
            if noun in lists["truth"][0]:
                mark("truth", lists["truth"][0].index(noun))
                continue
            if noun in lists["hallu"][0]:
                mark("hallu", lists["hallu"][0].index(noun))
            for j, word in enumerate(lists["hallu"][0]):
                if similar(noun, word):
                    mark("hallu", j)
                    break
            safe = False
            for j, word in enumerate(lists["truth"][0]):
                if similar(noun, word):
                    safe = True
                    mark("truth", j)
                    break
            bad += not safe
        m["chair"] += bad
        n["chair"] += len(nouns)
        for name, figure in (("truth", "cover"), ("hallu", "cog")):
            _, marks, size = lists[name]
            m[figure] += sum(marks[-size:])
            n[figure] += len(marks[-size:])
        m["good"] += bad == 0
        n["good"] += 1
    return {
        "CHAIR": round(m["chair"] / n["chair"] * 100, 1),
        "Cover": round(m["cover"] / n["cover"] * 100, 1),
        "Cog": round(m["cog"] / n["cog"] * 100, 1),
        "Hal": round(100 - m["good"] / n["good"] * 100, 1),
    }


def crpe(rows: Sequence[Row]) -> dict[str, float]:
    """open-compass/VLMEvalKit e8e78f0: rows with prediction, answer, category."""

    def correct(truth: str, text: str) -> bool:
        if len(text) == 1:
            return text[0] == truth[0]
        if text[0] in ["A", "B", "C", "D"]:
            return text[0] == truth[0]
        return truth[4:].lower() in text.lower()

    score: dict[str, list[int]] = {}
    for i in range(0, len(rows), 4):
        ok = all(correct(r["answer"], r["prediction"]) for r in rows[i : i + 4])
        score.setdefault(rows[i]["category"], []).append(ok)
        score.setdefault("total", []).append(ok)
    return {name: sum(values) / len(values) for name, values in score.items()}


def crpe_all_seeing(rows: Sequence[Row]) -> float:
    """OpenGVLab/all-seeing: exactly the letter."""
    groups = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    return sum(all(len(r["prediction"]) <= 1 and r["prediction"] == r["answer"] for r in g) for g in groups) / len(
        groups
    )


def mmvp(verdicts: Sequence[str]) -> float:
    """tsb0601/MMVP 7635005: replies of the judge in the order of the answers."""
    index = right = good = total = 0
    for reply in verdicts:
        grade = reply.lower() if re.match(r"^(yes|no)$", reply, re.IGNORECASE) else "unclear"
        index += 1
        right += grade == "yes"
        if index == 2:
            good, total, index, right = good + (right == 2), total + 1, 0, 0
    return good / total


def mmhal(replies: Sequence[str]) -> tuple[float, float, list[float]]:
    """Score, hallucination rate, and score by type."""
    scores = []
    for reply in replies:
        seen = [s for s in range(7) if f"rating: {s}" in reply.lower()]
        scores.append(seen[0] if len(seen) == 1 else 0)
    by_type = [[s for k, s in enumerate(scores) if k % 8 == t] for t in range(8)]
    rate = sum(s < 3 for s in scores) / len(scores)
    return sum(scores) / len(scores), rate, [sum(v) / len(v) for v in by_type]


def llava_bench(reviews: Sequence[tuple[str, str]]) -> dict[str, float]:
    """(category, reply) pairs to the printed figures."""

    def parse(review: str) -> list[float]:
        try:
            parts = review.split("\n")[0].replace(",", " ").split(" ")
            return [float(parts[0]), float(parts[1])] if len(parts) == 2 else [-1, -1]
        except ValueError:
            return [-1, -1]

    table: dict[str, list[list[float]]] = {}
    for category, reply in reviews:
        for name in (category, "all"):
            table.setdefault(name, []).append(parse(reply))
    result = {}
    for name, pairs in table.items():
        first, second = (round(sum(p[k] for p in pairs) / len(pairs), 3) for k in (0, 1))
        result[name] = round(second / first * 100, 1)
    return result


def cceval(
    captions: Sequence[Row], replies: Sequence[tuple[str, str, str]], truths: Sequence[list[str]]
) -> dict[str, float]:
    """bronyayang/HallE_Control d101291: captions, the judge's three replies for each, and the objects by place."""

    def listed(reply: str) -> list[str]:
        match = re.search(r"\[(.*?)\]", reply)
        return [x.strip(" '") for x in match.group(1).split(",")] if match else []

    captions_count = bad_captions = bad_words = words = raw_words = length = missed = true_words = 0
    for caption, (named, wrong, uncovered), truth in zip(captions[:100], replies, truths, strict=False):
        raw = list(set(listed(named)))
        brackets = list(set(re.findall(r"\[(.*?)\]", caption["text"])))
        hallucinated = [x for x in set(listed(wrong)) if x != ""]
        length += len(caption["text"].split(" "))
        words += len(set(raw + brackets))
        raw_words += len(raw)
        bad_words += len(hallucinated)
        bad_captions += len(hallucinated) > 0
        captions_count += 1
        missed += len([x for x in set(listed(uncovered)) if x != ""])
        true_words += len(set(truth))
    return {
        "CHAIRs": bad_captions / captions_count,
        "CHAIRi": bad_words / words,
        "CHAIRi_n": bad_words / raw_words,
        "words": length / captions_count,
        "objects": words / captions_count,
        "coverage": 1 - missed / true_words,
    }


def lvlm_ehub(text: str, label: str) -> bool:
    """OpenGVLab/Multi-Modality-Arena, for labels yes and no: punctuation, case, and the label as a word."""

    def process(s: str) -> str:
        s = s.replace("\n", " ").replace("\t", " ").strip()
        out = s
        for p in [
            ";",
            "/",
            "[",
            "]",
            '"',
            "{",
            "}",
            "(",
            ")",
            "=",
            "+",
            "\\",
            "_",
            "-",
            ">",
            "<",
            "@",
            "`",
            ",",
            "?",
            "!",
        ]:
            if p + " " in s or " " + p in s or re.search(r"(\d)(\,)(\d)", s) is not None:
                out = out.replace(p, "")
            else:
                out = out.replace(p, " ")
        out = re.compile(r"(?!<=\d)(\.)(?!\d)").sub("", out, 32)
        return " ".join(w for w in out.lower().split() if w not in ["a", "an", "the"])

    return re.search(r"\b" + re.escape(process(label)) + r"\b", process(text)) is not None


def object_halbench(rows: Sequence[tuple[list[str], set[str], str]], classes: dict[str, str]) -> dict[str, float]:
    """RLHF-V 3d35a91 after extraction: (different object words, true classes, answer)."""
    total = some = bad_answers = bad_words = words = hit = true = length = 0
    for objects, truth, answer in rows:
        objects_left = [w for w in objects if w != "seat" or "toilet" not in objects]
        nodes = [classes[w] for w in objects_left if w in classes]
        wrong = [node for node in nodes if node not in truth]
        total, some, bad_answers = total + 1, some + (len(nodes) > 0), bad_answers + (len(wrong) > 0)
        bad_words, words = bad_words + len(wrong), words + len(nodes)
        hit, true = hit + len({n for n in nodes if n in truth}), true + len(truth)
        length += len(answer.strip().split(" "))
    return {
        "CHAIRs": bad_answers / total,
        "CHAIRs_refine": bad_answers / some,
        "CHAIRi": bad_words / words,
        "recall": hit / true,
        "words": length / total,
    }


def mme(files: dict[str, Sequence[tuple[str, str, str, str]]]) -> tuple[dict[str, float], float, float]:
    """The evaluation tool of MME: score of each task of (image, question, truth, response), and the two sums."""
    perception = [
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    ]  # fmt: skip
    cognition = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
    scores: dict[str, float] = {}
    for task, lines in files.items():
        right = both = images = 0
        for k in range(0, len(lines), 2):
            pair = 0
            for _, _, truth, response in lines[k : k + 2]:
                start = response.lower()[:4]
                label = "yes" if "yes" in start else ("no" if "no" in start else "other")
                pair += label == truth.lower()
            right, both, images = right + pair, both + (pair == 2), images + 1
        scores[task] = right / len(lines) * 100 + both / images * 100
    sums = [sum(scores[t] for t in names if t in scores) for names in (perception, cognition)]
    return scores, sums[0], sums[1]


def gavie(replies: Sequence[str]) -> tuple[float, float, int]:
    """Mean accuracy and relevancy of replies in the format that the released prompt asks for, and replies without both."""
    accuracy, relevancy, unread = [], [], 0
    for reply in replies:
        found: dict[str, float] = {}
        part = ""
        for line in reply.split("\n"):
            words = line.strip().lower()
            part = words[:-1] if words in {"relevancy:", "accuracy:"} else part
            if words.startswith("score of the answer1: ") and part not in found:
                found[part] = float(words.removeprefix("score of the answer1: ").split("/")[0])
        if set(found) == {"relevancy", "accuracy"} and max(found.values()) <= 10:
            accuracy.append(found["accuracy"])
            relevancy.append(found["relevancy"])
        else:
            unread += 1
    return sum(accuracy) / len(accuracy), sum(relevancy) / len(relevancy), unread


def chair(captions: Sequence[Sequence[str]], truths: Sequence[set[str]]) -> tuple[float, float]:
    """CHAIRi and CHAIRs of LisaAnne/Hallucination over the objects that each caption mentions, repeats included."""
    words = hallucinated_words = hallucinated_captions = 0
    for mentioned, truth in zip(captions, truths, strict=True):
        hallucinated = False
        for noun in mentioned:
            if noun not in truth:
                hallucinated_words += 1
                hallucinated = True
        words += len(mentioned)
        hallucinated_captions += hallucinated
    return hallucinated_words / words, hallucinated_captions / len(captions)
