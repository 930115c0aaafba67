"""Writes the test rows of three tasks whose answers are short and exact: two with JSON, one with a number.

    python tests/benchmarks/short_answers.py tests/benchmarks/tasks [--seed 0] [--n-rows 60]
    {"input": "We need 12 oak shelves, please.", "output": "{\"item\": \"oak shelves\", \"quantity\": 12}"}

Sentences are drawn from templates and words that were written for this; all of it is in the public domain (CC0-1.0).
Another seed gives other rows, which no test row equals: a rule can be tried on them without test rows being read.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

TEST_SEED = 0
TASKS = ("order-item", "notice-place", "number-asked")


def listed(text: str) -> list[str]:
    """The parts between commas."""
    return text.split(", ")


KINDS = listed(
    "blue pens, red pens, oak shelves, garden chairs, paper bags, wool blankets, desk lamps, "
    "ink cartridges, tea towels, steel bolts, glass jars, bicycle bells, party hats, printer labels, "
    "rubber boots, soup bowls, travel mugs, wall clocks, safety vests, sketch books, tulip bulbs, "
    "wine glasses, yoga mats, cotton shirts, door handles, egg cartons, fish hooks, guitar strings, "
    "hand towels, key rings, lemon trees, mouse traps, night lights, picture frames, rain coats, "
    "shoe boxes, tent pegs, window blinds, coffee filters, dog leads, fence posts, gift cards, "
    "paint brushes, pillow cases"
)
ORDERS = (
    "Hi, could you send {n} {item} to our office?",
    "Please put me down for {n} {item}.",
    "we need {n} {item} by friday, thanks",
    "I would like to order {n} {item} for the school fair.",
    "{N} {item}, please, the same as last year.",
    "My sister asked me to get {n} {item} from you.",
    "Order for table six in the warehouse: {item}, {n} of them.",
    "Can I still add {n} {item} to what I ordered on Monday?",
    "The kindergarten is short of {item}; {n} should be enough.",
    "As agreed on the phone, we take {n} {item} at the old price.",
    "Good morning! How soon could {n} {item} be here?",
    "No pictures this time, just {n} {item} and the bill.",
    "ship {n} {item} to 4 Mill Lane pls",
    "After the flood we have to replace {n} {item}.",
    "Our usual {item} again, but {n} this time instead of {other}.",
    "Not {other} but {n} {item}, I counted wrong.",
    "If they are still on sale, I'll have {n} {item}.",
    "The new shop opens in May and wants {n} {item} on its first day.",
    "Dear team, kindly deliver {n} {item} to the back door before 9.",
    "Could it be {n} {item}? My boss said {other} would not do.",
)
WORDS = {2: "two", 3: "three", 5: "five", 6: "six", 8: "eight", 10: "ten", 12: "twelve", 20: "twenty"}

EVENTS = listed(
    "The spring concert, The book sale, A talk on bees, The chess evening, Our summer party, "
    "The repair day, The bake sale, A first aid course, The choir's rehearsal, The flea market, "
    "The parents' meeting, A reading for children, The quiz night, The street music day, "
    "A blood donation, The lantern walk, The film night, The seed swap, The poetry slam, "
    "The flu clinic"
)
PLACES = listed(
    "Town Hall, Mill Park, the old library, St. Mary's Church, Harbour School, the fire station, "
    "Green Lane Hall, the museum garden, Riverside Café, the village green, Room 12, "
    "the sports centre, Oak Street Gym, the railway station, Castle Yard, the swimming pool, "
    "Baker's Barn, the youth club, Market Square, the city archive, North Beach, the health centre"
)
MONTHS = listed(
    "January, February, March, April, May, June, July, August, September, October, November, December"
)
NOTICES = (
    "{event} is on {date} at {place}.",
    "{event} takes place at {place} on {date}. Everyone is welcome!",
    "Save the date: {date}. {event} comes to {place} again.",
    "{event} had to move. The new date is {date}, and we meet at {place}.",
    "On {date}, {place} opens its doors at 6. {event} begins an hour later.",
    "Please note: {event} will be held at {place} and not, as printed, at {elsewhere}. It stays on {date}.",
    "{event}, {date}, {place}. Bring a chair and something to drink.",
    "Because of the storm, {event_lower} is put off until {date}. Place: {place}.",
    "Dear neighbours, {event_lower} is planned for {date}; you find us at {place}.",
    "See you at {place}! {event} starts at noon on {date}, rain or shine.",
    "We are looking for ten helpers: {event_lower} at {place} needs you on {date}.",
    "Tickets at {elsewhere}, from Monday. {event} itself is on {date} at {place}.",
    "{event} was a success, so there is a second one on {date}, again at {place}.",
    "no classes on {date}, {event_lower} needs all of {place}",
    "Reminder from the council: {event_lower}, {place}, {date}, entry is free.",
)

COUNTS = (
    (
        "The bus has {a} seats, {b} of them by the window, and {c} are broken.",
        (
            "How many seats does the bus have?",
            "How many seats are by the window?",
            "How many seats are broken?",
        ),
    ),
    (
        "Maria picked {a} apples and {b} pears; {c} of the fruits went to her neighbour.",
        (
            "How many apples did Maria pick?",
            "How many pears did Maria pick?",
            "How many fruits did the neighbour get?",
        ),
    ),
    (
        "Our school bought {a} balls, {b} ropes and {c} mats.",
        ("How many balls were bought?", "How many ropes were bought?", "How many mats were bought?"),
    ),
    (
        "In room {a} there are {b} chairs, but {c} people came.",
        ("What is the number of the room?", "How many chairs are there?", "How many people came?"),
    ),
    (
        "The hike is {a} km long, takes {b} hours and goes up {c} metres.",
        ("How long is the hike in km?", "How many hours does it take?", "How many metres does it go up?"),
    ),
    (
        "Flat {a} is on floor {b} and costs {c} euros a month.",
        ("What is the number of the flat?", "On which floor is it?", "What does it cost a month?"),
    ),
    (
        "Of {a} letters, {b} were lost and {c} came late.",
        ("How many letters were there?", "How many letters were lost?", "How many letters came late?"),
    ),
    (
        "grandpa is {a}, his dog is {b} and the house is {c} years old.",
        ("How old is grandpa?", "How old is the dog?", "How old is the house?"),
    ),
    (
        "Line {a} stops here every {b} minutes, and its bus has {c} seats.",
        ("Which line stops here?", "How many minutes lie between two stops?", "How many seats has the bus?"),
    ),
    (
        "A box holds {a} bottles. We have {b} boxes, and {c} fit into the van.",
        ("How many bottles are in a box?", "How many boxes do we have?", "How many boxes fit into the van?"),
    ),
    (
        "On Monday {a} guests came, on Tuesday {b}, on Wednesday {c}.",
        ("How many came on Monday?", "How many came on Tuesday?", "How many came on Wednesday?"),
    ),
    (
        "The recipe asks for {a} grams of flour, {b} grams of sugar and {c} eggs.",
        ("How many grams of flour are needed?", "How many grams of sugar?", "How many eggs are needed?"),
    ),
    (
        "Tom ran {a} laps, Ann ran {b}, and the record stands at {c}.",
        ("How many laps did Tom run?", "How many laps did Ann run?", "What is the record?"),
    ),
    (
        "The farm keeps {a} cows, {b} goats and, since May, {c} hens.",
        ("How many cows are there?", "How many goats are there?", "How many hens are there?"),
    ),
    (
        "Page {a} of the report says that {b} shops closed and {c} opened.",
        ("On which page is that?", "How many shops closed?", "How many shops opened?"),
    ),
)


def order(chance: random.Random) -> tuple[str, str]:
    """An order, and its item and quantity; a quantity is often a digit, sometimes a word."""
    n, other = chance.sample(
        [2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 20, 24, 25, 30, 36, 40, 50, 60, 75, 100], 2
    )
    item = chance.choice(KINDS)
    shown = WORDS[n] if n in WORDS and chance.random() < 0.3 else str(n)
    text = chance.choice(ORDERS).format(n=shown, N=shown.capitalize(), item=item, other=other)
    return text, json.dumps({"item": item, "quantity": n})


def notice(chance: random.Random) -> tuple[str, str]:
    """A notice, and its date and place as it writes them."""
    event = chance.choice(EVENTS)
    place, elsewhere = chance.sample(PLACES, 2)
    date = f"{chance.randint(1, 28)} {chance.choice(MONTHS)}"
    text = chance.choice(NOTICES).format(
        event=event, event_lower=event[0].lower() + event[1:], date=date, place=place, elsewhere=elsewhere
    )
    return text[0].upper() + text[1:], json.dumps({"date": date, "place": place}, ensure_ascii=False)


def number(chance: random.Random) -> tuple[str, str]:
    """A sentence with three numbers and a question, and the number that is asked for."""
    sentence, questions = chance.choice(COUNTS)
    numbers = chance.sample(range(2, 100), 3)
    asked = chance.randrange(3)
    return f"{sentence.format(a=numbers[0], b=numbers[1], c=numbers[2])} {questions[asked]}", str(
        numbers[asked]
    )


MAKERS: dict[str, Callable[[random.Random], tuple[str, str]]] = dict(
    zip(TASKS, (order, notice, number), strict=True)
)


def rows(task: str, seed: int, n_rows: int) -> list[dict[str, str]]:
    """Different rows of a task. With another seed than TEST_SEED none of the first 60 of that seed is among them."""
    chance, found = random.Random(f"{task}/{seed}"), {}
    taken = {row["input"] for row in rows(task, TEST_SEED, 60)} if seed != TEST_SEED else set()
    while len(found) < n_rows:
        text, output = MAKERS[task](chance)
        if text not in taken:
            found[text] = output
    return [{"input": text, "output": output} for text, output in found.items()]


def main() -> None:
    """Writes TASK.test.jsonl of each task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=TEST_SEED)
    parser.add_argument("--n-rows", type=int, default=60)
    arguments = parser.parse_args()
    for task in TASKS:
        lines = [
            json.dumps(row, ensure_ascii=False) + "\n" for row in rows(task, arguments.seed, arguments.n_rows)
        ]
        (arguments.directory / f"{task}.test.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
