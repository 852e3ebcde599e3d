"""Prompt, retrieve or fine-tune: what `craton compare` measures and recommends, on two real tasks and planted worlds.

BANKING77 (a mapping to learn) and XQuAD (facts to look up) want opposite answers. In the planted worlds the right one
is known: facts that only documents hold, a mapping that only training teaches, a skill that the model has, and noise.
`ours` is the quality of a way on the sealed test with its 95 % interval; the peers are the model as it is and the most
frequent answer. A world's figure is the share of its seeds on which the recommendation was right.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import Case, case, machine, parser, report

from craton.compare.settings import CompareSettings
from craton.compare.study import Comparison, Watch, compare, task_files
from craton.compare.ways import tune
from craton.evaluation.intervals import Estimate
from craton.evaluation.tasks import load_task
from craton.retrieval.collection import Collection, CollectionSettings
from craton.retrieval.fusion import DENSE, LEXICAL
from craton.retrieval.index import Encoder, Index

DATA = Path(__file__).parents[2] / "shared" / "data"
WORDS = "order table lamp river stone paper window garden letter train market winter music bread coffee road"
CHEAP = {"zero-shot", "prompt"}
CAPITALS = """
    France Paris Italy Rome Spain Madrid Germany Berlin Japan Tokyo China Beijing Russia Moscow Egypt Cairo
    Iran Tehran Iraq Baghdad Greece Athens Turkey Ankara Poland Warsaw Austria Vienna Hungary Budapest
    Portugal Lisbon Ireland Dublin Norway Oslo Sweden Stockholm Finland Helsinki Denmark Copenhagen Cuba
    Havana Peru Lima Chile Santiago Kenya Nairobi India Delhi Thailand Bangkok Vietnam Hanoi Canada Ottawa
    Australia Canberra Belgium Brussels Romania Bucharest Bulgaria Sofia Serbia Belgrade Croatia Zagreb Syria
    Damascus Lebanon Beirut Jordan Amman Libya Tripoli Algeria Algiers Morocco Rabat Ghana Accra Nigeria Abuja
    Nepal Kathmandu Philippines Manila Colombia Bogota Venezuela Caracas Ecuador Quito Uruguay Montevideo
    Paraguay Asuncion Jamaica Kingston Honduras Tegucigalpa Nicaragua Managua Indonesia Jakarta Taiwan Taipei
    Mongolia Ulaanbaatar Bangladesh Dhaka Afghanistan Kabul Pakistan Islamabad Kazakhstan Astana Uzbekistan Tashkent
    Georgia Tbilisi Armenia Yerevan Azerbaijan Baku Belarus Minsk Lithuania Vilnius Latvia Riga Estonia Tallinn
    Iceland Reykjavik Netherlands Amsterdam Switzerland Bern Slovenia Ljubljana Slovakia Bratislava Czechia Prague
    Albania Tirana Malta Valletta Cyprus Nicosia Qatar Doha Bahrain Manama Oman Muscat Sudan Khartoum
    Somalia Mogadishu Uganda Kampala Rwanda Kigali Tanzania Dodoma Zambia Lusaka Zimbabwe Harare Mozambique Maputo
    Angola Luanda Namibia Windhoek Botswana Gaborone Senegal Dakar Mali Bamako Niger Niamey Tunisia Tunis
    Laos Vientiane Fiji Suva Montenegro Podgorica Liberia Monrovia Gambia Banjul Gabon Libreville Cameroon Yaounde
    Bahamas Nassau Barbados Bridgetown Suriname Paramaribo Guyana Georgetown Moldova Chisinau Bhutan Thimphu
    Tajikistan Dushanbe Kyrgyzstan Bishkek Eritrea Asmara Malawi Lilongwe
"""


def main() -> int:
    """Run the comparisons; the quick form is one planted world."""
    command = parser(__doc__.partition("\n")[0])
    command.add_argument("--only", metavar="TEXT", default="", help="only parts whose name holds this text")
    flags = command.parse_args()
    cases: dict[str, Case] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts: dict[str, Callable[[], dict[str, Case]]] = {}
        if not flags.quick and DATA.is_dir():
            parts["banking77"] = lambda: real(folder, "banking77", banking, minutes=25)
            parts["xquad"] = lambda: real(folder, "xquad", xquad, minutes=3)
            parts["xquad/recall"] = lambda: recall(folder)
        for name in ["facts"] if flags.quick else WORLDS:
            parts[f"world/{name}"] = lambda name=name: world(folder, name, seeds=1 if flags.quick else 3)
        for name, measure in parts.items():
            if flags.only in name:
                cases |= measure()
    report({"machine": machine(("craton", "torch")), "cases": cases}, flags.json)
    return 0


def real(folder: Path, name: str, write: Callable[[Path], Path], minutes: float) -> dict[str, Case]:
    """A row for each way on a real task, beside the model as it is and the most frequent answer."""
    found = run(write(folder), seeds=2, minutes=minutes, trials=5)
    verdict, metric = found.verdict, found.task.metric
    cases = {}
    for m in found.measurements:
        if m.label == "majority":
            continue
        chosen = ", recommended" if m.label == verdict.recommended else ", tied" if m.label in verdict.tied else ""
        figures = (
            {name: verdict.quality, f"{name}/exact match": exact(found)} if metric == "f1" else {name: verdict.quality}
        )
        for title, quality in figures.items():
            one = quality[m.label]
            peers = {"zero-shot": quality["zero-shot"].value, "most frequent answer": quality["majority"].value}
            cases[f"{title}/{m.label}"] = case(
                one.value,
                {peer: value for peer, value in peers.items() if value and peer != m.label},
                metric if title == name else "exact match",
                settings={"Craton": f"{one.low:.3f} to {one.high:.3f}{chosen}"},
            )
    return cases


def exact(found: Comparison) -> dict[str, Estimate]:
    """The share of exact matches of each way."""
    return {m.label: m.figures["exact_match"] for m in found.measurements}


def recall(folder: Path, k: int = 5) -> dict[str, Case]:
    """The share of XQuAD's test questions whose paragraph is among the first five, beside each search alone."""
    task = load_task(xquad(folder))
    encoder = Encoder("minilm-l6-v2")
    with Collection.create(folder / "xquad.sqlite", CollectionSettings(encoder=encoder.name)) as collection:
        collection.sync(task_files(task), encoder, encoder.count)
        print(tune(Index(collection, encoder, "xquad"), task), flush=True)
        items = task.test.open()
        vectors = encoder([item.input for item in items])
        found = {
            name: [
                bool(set(item.gold) & {hit.document for hit in collection.search(item.input, v, k=k, fusion=fusion)})
                for item, v in zip(items, vectors, strict=True)
            ]
            for name, fusion in (("tuned", collection.fusion), ("vectors alone", DENSE), ("BM25 alone", LEXICAL))
        }
    ours, *peers = (float(np.mean(one)) for one in found.values())
    return {f"xquad/recall@{k}": case(ours, dict(zip(list(found)[1:], peers, strict=True)), "recall", limit=0.95)}


def world(folder: Path, name: str, seeds: int) -> dict[str, Case]:
    """The share of seeds on which the recommendation in a planted world was the right one."""
    write, right = WORLDS[name]
    said = []
    for seed in range(seeds):
        place = folder / f"{name}{seed}"
        place.mkdir()
        found = run(write(place, np.random.default_rng(seed)), seeds=1, minutes=2, trials=8, seed=seed)
        verdict = found.verdict
        said.append(right(verdict))
        print(f"{name}, seed {seed}: {verdict.sentence}", flush=True)
    return {f"world/{name}": case(float(np.mean(said)), {}, "right recommendations", limit=1.0)}


def run(task: Path, **settings: Any) -> Comparison:
    """A comparison, with a line for each step."""
    last = [""]

    def say(doing: str) -> None:
        if doing.partition(":")[0] != last[0]:
            last[0] = doing.partition(":")[0]
            print(f"  {doing}", flush=True)

    return compare(str(task), CompareSettings(**settings), {}, Watch(on_progress=say))


def banking(folder: Path) -> Path:
    """77 intents of a bank's customers: 2,000 training questions, 300 of the test."""
    data = f'train = "{DATA}/banking77/train.csv"\ntest = "{DATA}/banking77/test.csv"\n'
    split = "most_train = 2000\nmost_dev = 60\nmost_test = 300\n"
    return written(folder / "banking77.toml", f"[data]\n{data}[split]\n{split}")


def xquad(folder: Path) -> Path:
    """Questions about 240 paragraphs, split by article."""
    data = f'items = "{DATA}/xquad/xquad.en.json"\n'
    return written(folder / "xquad.toml", f"[data]\n{data}[split]\nmost_dev = 40\nmost_test = 150\n")


def facts(folder: Path, rng: np.random.Generator) -> Path:
    """Codes of invented places: nothing but the documents holds them."""
    names = list(dict.fromkeys(f"{a}{b}{c}" for a, b, c in rng.choice(SYLLABLES, (400, 3))))[:140]
    (folder / "docs").mkdir()
    rows = []
    for name in names:
        code, title = str(rng.integers(1000, 9999)), name.title()
        written(folder / "docs" / f"{name}.txt", f"{title} lies in the north. The code of {title} is {code}.")
        gold = f"docs/{name}.txt"
        rows.append({"question": f"What is the code of {title}?", "answer": code, "gold": gold, "group": name})
    return lines(folder, rows, 'docs = ["docs"]\nmetric = "contains"\n')


def mapping(folder: Path, rng: np.random.Generator) -> Path:
    """Two invented classes told by one capital word, which an uncased encoder cannot see."""
    words = WORDS.split()
    rows = []
    for i in range(420):
        some = rng.choice(words, 5).tolist()
        loud = bool(i % 2)
        if loud:
            place = int(rng.integers(5))
            some[place] = some[place].upper()
        rows.append({"text": f"the {' '.join(some)}", "label": "vex" if loud else "dax"})
    return lines(folder, rows, "")


def skill(folder: Path, rng: np.random.Generator) -> Path:
    """Capitals, which the model knows: nothing is to be looked up or learnt."""
    words = np.array(CAPITALS.split()).reshape(-1, 2)
    pairs = rng.choice(words, 100, replace=False)
    rows = [{"question": f"What is the capital of {country}?", "answer": str(city)} for country, city in pairs]
    return lines(folder, rows, 'metric = "contains"\nkind = "answer"\n', train=0.2)


def noise(folder: Path, rng: np.random.Generator) -> Path:
    """Labels that are drawn: nothing can be learnt."""
    rows = [
        {"text": " ".join(rng.choice(SYLLABLES, 6)), "label": str(rng.choice(["left", "right"]))} for _ in range(300)
    ]
    return lines(folder, rows, "")


def lines(folder: Path, rows: list[dict[str, str]], head: str, train: float = 0.4) -> Path:
    """Items and their task file. train: the share to train on."""
    written(folder / "items.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return written(
        folder / "task.toml",
        f'{head}[data]\nitems = "items.jsonl"\n[split]\ntrain = {train}\nmost_dev = 40\nmost_test = 80\n',
    )


def written(path: Path, text: str) -> Path:
    """The path, with this text in it."""
    path.write_text(text, encoding="utf-8")
    return path


SYLLABLES = ["zor", "vik", "mal", "ten", "bru", "kas", "lop", "nim", "qua", "rel", "sto", "fen", "gar", "hul"]
WORLDS: dict[str, tuple[Callable[[Path, np.random.Generator], Path], Callable[[Any], bool]]] = {
    "facts": (facts, lambda v: "retrieval" in v.recommended and "lora" not in v.tied),
    "mapping": (mapping, lambda v: "lora" in v.recommended and not CHEAP & set(v.tied)),
    "skill": (skill, lambda v: v.recommended in CHEAP),
    "noise": (noise, lambda v: v.kind == "tie" and v.beats_majority is False),
}


if __name__ == "__main__":
    raise SystemExit(main())
