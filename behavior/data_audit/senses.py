"""Nouns with two concrete senses, both of which photographs show.

The nouns are COCO categories and frequent nouns of captions, chosen for this project. Source of the polysemy: each has two or
more noun senses in the concrete files of WordNet 3.1 (Princeton University, https://wordnet.princeton.edu; Fellbaum 1998):
animal, artifact, body, food, group, location, object, person, plant, shape, substance. The two senses named here are those that
photographs show, in this project's words. Shu et al. (arXiv 2501.01346, Appendix E) name polysemy as a cause of misalignment:
"the bat hit the ball".
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_LIST = """apple: fruit / computer brand; arm: body part / part of a chair; bank: building / river side; bark:
    tree skin / boat; barrel: cask / gun part; base: baseball bag / foot of a lamp; bat: club / animal; battery:
    power cell / guns; beam: timber / light ray; bill: beak / bank note; blind: window cover / person; block:
    toy / street square; board: plank / sign; bolt: screw / lightning; boot: shoe / car trunk; bow: knot /
    weapon; bowl: dish / stadium; box: container / theater seat; branch: tree limb / bank office; brush: tool /
    bushes; bulb: lamp / plant; button: clothing / switch; cap: hat / lid; card: paper / playing card; cart:
    wagon / vehicle; chicken: animal / meat; chip: snack / computer part; club: stick / building; coach: trainer
    / bus; column: pillar / print column; comb: tool / rooster crest; cone: road marker / ice cream; counter:
    kitchen top / checkout; crane: bird / machine; cross: symbol / crossing; crown: head ornament / tooth cap;
    deck: porch / cards; diamond: gem / baseball field; dish: plate / antenna; drill: tool / exercise; drum:
    instrument / barrel; duck: bird / cloth; fan: blower / supporter; fish: animal / food; glass: vessel / pane;
    hood: clothing / car part; horn: animal part / instrument; iron: appliance / golf club; jet: airplane /
    water stream; key: door key / keyboard key; lamb: animal / meat; leaf: plant part / table part; light: lamp
    / traffic light; log: wood / book; match: game / fire stick; mouse: animal / computer device; nail: finger /
    metal pin; needle: sewing tool / pine leaf; net: sports net / fishing net; nut: food / metal ring; orange:
    fruit / color; palm: tree / hand; park: garden / parking area; pen: writing tool / animal fence; pipe: tube
    / smoking tool; pitcher: jug / player; plant: green plant / factory; plate: dish / license plate; pool:
    water / billiards; pot: pan / flower pot; ram: animal / truck; ring: jewelry / boxing ring; roll: bread /
    paper roll; ruler: measuring stick / king; scale: weighing device / fish skin; screen: display / door net;
    seal: animal / stamp; sheet: bedding / paper; stall: market stand / toilet cabin; stand: frame / grandstand;
    star: sky body / shape; stick: branch / hockey stick; stool: seat / step; straw: drinking tube / dry grass;
    tank: container / military vehicle; tap: faucet / shoe plate; tie: clothing / railroad tie; track: rails /
    running track; train: railway / dress part; trunk: tree stem / elephant nose / car part; turkey: bird /
    meat; vessel: ship / container; watch: timepiece / guard; wave: water / hair; wing: bird part / airplane
    part / building part; bridge: road / nose part; court: sports field / building; face: body part / clock
    face; hand: body part / clock hand; head: body part / shower head; leg: body part / table part; mouth: body
    part / river end; neck: body part / bottle part; nose: body part / airplane part; tail: animal part /
    airplane part; tongue: body part / shoe part; pupil: eye part / student; monitor: screen / lizard; kiwi:
    bird / fruit; cardinal: bird / priest; beetle: insect / car; bug: insect / listening device; mint: plant /
    candy; squash: vegetable / racket sport"""
SENSES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        name.strip(): tuple(sense.strip() for sense in senses.split("/"))
        for name, _, senses in (entry.partition(":") for entry in " ".join(_LIST.split()).split(";"))
    }
)
"""Noun in the singular to two or three concrete senses."""
