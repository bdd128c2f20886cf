"""Word lists of the parser of descriptions: visible things, attributes, predicates, and words that only look like them.

The lists were written from the words of released captions of COCO images (RUCAIBox/POPE,
    without the images of the annotated
sentences that the parser is tested on), the names of COCO, Visual Genome and GQA, and the synonyms of `concepts.nouns`.
"""

from __future__ import annotations

from concepts.nouns import SYNONYMS


def _words(text: str) -> frozenset[str]:
    return frozenset(" ".join(entry.split()) for entry in text.replace("\n", " ").split(",") if entry.strip())


OBJECT_NOUNS: frozenset[str] = frozenset(word for group in SYNONYMS for word in group) | _words("""people,
    crowd, couple, family, friend, tourist, visitor, pedestrian, spectator, onlooker, audience,
    customer, diner, guest, traveler, commuter, individual, attendee, participant, teammate, opponent,
    bridesmaid, groomsman, nurse, doctor, pilot, clown, monk, priest, musician, guitarist, singer, dancer,
    artist, photographer, barber, hairdresser, lifeguard, sailor, pirate, king, queen, angel, model, mannequin,
    trainer, coach, batter, pitcher, hitter, goalie, goalkeeper, jockey, horseman, horsewoman, hiker, camper,
    climber, kayaker, rower, parasailer, kitesurfer, windsurfer, paddleboarder, sunbather, beachgoer, villager,
    resident, citizen, employee, staff, crew, captain, conductor, bartender, cook, baker, butcher, carpenter,
    mechanic, plumber, electrician, firefighter, sheriff, guard, bodyguard, general, veteran, senior, elder,
    grandmother, grandfather, grandma, grandpa, mom, dad, parent, twin, newborn, owner, barista, cashier,
    shepherd, herder, human being, police, police officer, snow dog, bunny, rabbit, hamster, squirrel, mouse,
    rat, lion, tiger, leopard, cheetah, monkey, gorilla, ape, camel, llama, alpaca, goat, pig, donkey, mule,
    deer, moose, elk, antelope, gazelle, buffalo, bison, wildebeest, hippo, hippopotamus, rhino, rhinoceros,
    giraffe, zebra, elephant, fox, wolf, raccoon, kangaroo, koala, otter, seal, whale, dolphin, shark, fish,
    goldfish, turtle, tortoise, lizard, snake, frog, crocodile, alligator, dinosaur, dragon, insect, bug,
    butterfly, bee, ladybug, spider, crab, lobster, penguin, turkey, chicken, chick, duckling, gosling, finch,
    robin, woodpecker, hummingbird, pheasant, egret, crane, stork, vulture, hawk, falcon, cub, calf, animal,
    creature, pet, livestock, wildlife, vehicle, van, wagon, trailer, camper, rv, tractor, bulldozer, forklift,
    excavator, scooter, segway, moped, tricycle, unicycle, cart, carriage, stroller, wheelchair, sled, sleigh,
    snowmobile, ambulance, fire truck, firetruck, fire engine, fire trucks, trolley, tram, streetcar, subway,
    subway train, engine, train engine, boxcar, caboose, freight car, train car, helicopter, glider, hot air
    balloon, blimp, rocket, spaceship, tank, raft, barge, tugboat, ferry boat, cruise ship, gondola, dinghy, jet
    ski, submarine, tow truck, dump truck, pickup truck, semi truck, food truck, garbage truck, school bus, tour
    bus, city bus, double decker bus, double-decker bus, police car, race car, steam engine, bike, chair,
    armchair, recliner, rocking chair, lounge chair, high chair, ottoman, footstool, stool, bar stool, barstool,
    throne, table, coffee table, side table, end table, picnic table, nightstand, night stand, dresser,
    wardrobe, closet, cabinet, cupboard, drawer, shelf, bookshelf, bookcase, rack, cubby, crib, bunk bed,
    mattress, headboard, bed frame, bedspread, comforter, blanket, quilt, sheet, pillow, pillowcase, cushion,
    towel, washcloth, rug, mat, doormat, carpet, curtain, drape, blind, shutter, tablecloth, placemat, napkin,
    lamp, lampshade, light, lantern, candle, candlestick, chandelier, light bulb, lightbulb, light fixture,
    ceiling fan, fan, heater, radiator, fireplace, chimney, air conditioner, mirror, picture, photo, painting,
    poster, portrait, frame, picture frame, artwork, mural, statue, sculpture, figurine, ornament, decoration,
    wreath, christmas tree, garland, ribbon, bow, balloon, toy, doll, puppet, teddy bear, stuffed animal,
    stuffed bear, plush toy, lego, block, puzzle, clock, alarm clock, grandfather clock, clock tower, clock
    face, watch, wristwatch, calendar, book, magazine, newspaper, notebook, notepad, paper, document, envelope,
    letter, card, postcard, map, menu, pen, pencil, marker, crayon, paintbrush, easel, chalkboard, blackboard,
    whiteboard, bulletin board, board, screen, monitor, computer, computer monitor, computer screen, desktop,
    desktop computer, laptop computer, computer mouse, mouse pad, mousepad, keyboard, key, button, printer,
    scanner, copier, fax machine, speaker, stereo, radio, headphone, earphone, earbud, microphone, camera, video
    camera, camcorder, tripod, television, projector, tablet, ipad, iphone, smartphone, charger, cable, cord,
    wire, plug, outlet, electrical outlet, power strip, switch, light switch, router, modem, game controller,
    controller, game console, video game console, gaming console, wii, wii remote, wii controller, remote
    control, joystick, console, dvd player, device, electronic device, machine, vending machine, sewing machine,
    washing machine, coffee machine, slot machine, washer, dryer, dishwasher, oven, stove, microwave, toaster,
    toaster oven, blender, mixer, coffee maker, coffee pot, coffeemaker, tea kettle, kettle, teapot,
    refrigerator, fridge, freezer, appliance, sink, faucet, countertop, counter top, counter, kitchen counter,
    kitchen island, island, stovetop, burner, backsplash, hood, cutting board, chopping board, pot, pan, frying
    pan, skillet, wok, baking sheet, baking pan, tray, platter, plate, dish, saucer, bowl, cup, mug, coffee cup,
    coffee mug, tea cup, teacup, glass, wine glass, drinking glass, tumbler, bottle, wine bottle, water bottle,
    beer bottle, jar, can, soda can, pitcher, jug, vase, basket, box, crate, carton, container, bin, trash can,
    trash bin, garbage can, dumpster, bucket, barrel, bag, plastic bag, paper bag, shopping bag, sack, backpack,
    purse, handbag, luggage, luggage carousel, suitcase, briefcase, duffel bag, tote bag, wallet, lunch box,
    lunchbox, cooler, utensil, silverware, cutlery, fork, knife, butter knife, spoon, spatula, ladle, whisk,
    tongs, chopstick, chopsticks, scissors, peeler, grater, rolling pin, oven mitt, apron, sponge, soap, soap
    dispenser, dispenser, paper towel, toilet paper, toilet paper roll, tissue, tissue box, toothbrush,
    toothpaste, razor, comb, brush, hairbrush, hair dryer, lotion, shampoo, makeup, perfume, toiletries, toilet,
    toilet bowl, toilet seat, toilet lid, toilet tank, bidet, urinal, bathtub, tub, bath tub, shower, shower
    curtain, shower head, shower door, towel rack, medicine cabinet, vanity, tile, drain, pipe, plunger, scale,
    ladder, tool, hammer, wrench, screwdriver, saw, drill, shovel, rake, broom, mop, vacuum, hose, rope, chain,
    string, net, fishing rod, fishing pole, hook, nail, screw, lock, padlock, lid, cap, cork, lever, handle,
    knob, doorknob, door, doorway, door frame, sliding door, garage door, gate, window, window sill, windowsill,
    window pane, wall, floor, ceiling, roof, rooftop, tower, steeple, dome, column, pillar, arch, archway,
    balcony, porch, patio, deck, terrace, staircase, stair, stairs, stairway, step, escalator, elevator,
    railing, rail, handrail, banister, fence, barrier, beam, ledge, awning, canopy, tent, umbrella, parasol,
    palapa, house, home, cabin, cottage, hut, shed, barn, garage, skyscraper, apartment, apartment building,
    office building, church, cathedral, temple, castle, palace, mansion, lighthouse, windmill, factory,
    warehouse, store, shop, storefront, market, marketplace, supermarket, grocery store, mall, restaurant, cafe,
    bar, pub, bakery, pizzeria, deli, hotel, motel, hotel room, hospital, school, classroom, library, museum,
    stadium, arena, gym, theater, station, train station, bus station, bus stop, gas station, fire station,
    police station, airport, terminal, hangar, runway, tarmac, platform, dock, pier, harbor, port, marina,
    shipyard, dockyard, boatyard, bridge, tunnel, overpass, road, street, city street, highway, freeway, alley,
    alleyway, lane, driveway, path, pathway, trail, walkway, sidewalk, crosswalk, curb, median, intersection,
    roadside, roadway, pavement, cobblestone, parking lot, parking space, parking spot, parking garage, parking
    meter, park, playground, garden, yard, backyard, lawn, field, grass field, meadow, pasture, plain, savanna,
    savannah, farm, farmland, ranch, orchard, vineyard, corral, pen, stable, stall, zoo, enclosure, aquarium,
    cage, kennel, nest, forest, woods, jungle, desert, mountain, mountain top, mountaintop, mountain range,
    hill, hillside, hilltop, slope, mountain slope, ski slope, mountainside, cliff, canyon, valley, cave, rock,
    stone, boulder, pebble, gravel, dirt, mud, sand, dune, soil, ground, terrain, land, landscape, grass, weed,
    bush, shrub, hedge, tree, tree trunk, trunk, tree branch, branch, twig, log, stump, leaf, foliage,
    vegetation, greenery, shrubbery, plant, potted plant, houseplant, cactus, flower, rose, tulip, daisy,
    sunflower, orchid, lily, daffodil, petal, bouquet, flower pot, flowerpot, planter, fern, moss, vine, ivy,
    bark, seaweed, driftwood, firewood, hay, straw, sky, cloud, sun, moon, star, rain, snow, ice, fog, smoke,
    steam, fire, flame, water, wave, ocean, sea, lake, river, stream, creek, pond, waterfall, pool, swimming
    pool, puddle, fountain, beach, shore, shoreline, coast, coastline, bay, surf, city, town, village, skyline,
    neighborhood, downtown, countryside, room, living room, dining room, bedroom, bathroom, kitchen, office,
    hallway, hall, lobby, lounge, waiting room, basement, attic, den, restroom, hotel room, locker room,
    conference room, dining hall, cafeteria, salon, studio, workshop, booth, phone booth, kiosk, stage, podium,
    backdrop, tarp, banner, flag, american flag, sign, street sign, stop sign, road sign, traffic sign,
    billboard, sticker, label, logo, apple logo, magnet, tag, ticket, traffic light, traffic signal, stoplight,
    streetlight, street light, street lamp, lamp post, lamppost, light pole, telephone pole, power line, power
    lines, utility pole, pole, post, flagpole, bollard, cone, traffic cone, barricade, fire hydrant, hydrant,
    manhole, mailbox, bench, park bench, picnic basket, trash, garbage, debris, track, train track, tracks,
    train tracks, railroad track, railway track, railroad, railroad tracks, railway, car seat, seat, seat belt,
    steering wheel, wheel, tire, windshield, bumper, headlight, taillight, license plate, mirror, side mirror,
    rearview mirror, dashboard, motor, propeller, wing, tail, cockpit, landing gear, nose, cab, sail, mast,
    anchor, oar, paddle, life jacket, life vest, life preserver, bow, hull, handlebar, pedal, saddle, bridle,
    rein, harness, leash, collar, bell, horn, antler, mane, hoof, paw, claw, fur, coat, feather, beak, tusk,
    ear, eye, mouth, lip, tongue, teeth, tooth, chin, cheek, forehead, face, head, hair, beard, mustache,
    moustache, ponytail, neck, shoulder, arm, elbow, wrist, hand, finger, thumb, forefinger, chest, stomach,
    belly, back leg, hind leg, front leg, lap, waist, hip, leg, knee, ankle, foot, toe, body, skin, tattoo,
    person, shirt, t-shirt, tee shirt, t shirt, tank top, dress shirt, polo shirt, blouse, sweater, sweatshirt,
    hoodie, jacket, coat, blazer, suit, suit jacket, tuxedo, vest, dress, gown, skirt, pants, jeans, shorts,
    trousers, leggings, sock, shoe, boot, sandal, sneaker, slipper, heel, flip flop, footwear, hat, cap,
    baseball cap, helmet, beanie, hood, visor, headband, bandana, scarf, tie, necktie, bow tie, bowtie, glove,
    mitten, belt, buckle, glasses, eyeglasses, sunglasses, goggles, mask, jewelry, necklace, earring, ring,
    bracelet, bead, crown, tiara, veil, wig, robe, bathrobe, kimono, costume, uniform, outfit, attire, clothing,
    clothes, garment, swimsuit, bathing suit, bikini, swim trunks, wetsuit, wet suit, pajamas, underwear, bra,
    bib, diaper, pocket, sleeve, button, zipper, cardigan, sash, cape, cloak, bandage, cast, crutch, cane,
    walker, wand, sword, gun, rifle, weapon, shield, armor, bow and arrow, cannon, baseball, baseball bat,
    baseball glove, baseball mitt, mitt, catcher's mitt, bat, ball, tennis ball, tennis racket, tennis racquet,
    racket, racquet, paddle, golf club, golf ball, soccer ball, football, basketball, volleyball, bowling ball,
    beach ball, sports ball, hockey stick, stick, puck, goal, goal post, hoop, basketball hoop, hula hoop,
    frisbee, disc, kite, kite string, parachute, parasail, surfboard, surf board, surfboards, paddle board,
    paddleboard, boogie board, bodyboard, wakeboard, skateboard, snowboard, ski, skis, ski pole, ski poles, ski
    lift, chairlift, chair lift, ski boot, roller skate, ice skate, skate, trampoline, swing, slide, seesaw,
    sandbox, swing set, court, tennis court, basketball court, baseball field, baseball diamond, soccer field,
    football field, home plate, base, mound, pitcher's mound, pitching mound, dugout, bleachers, stands,
    scoreboard, infield, outfield, track field, racetrack, race track, skate park, skatepark, skateboard park,
    ramp, half pipe, half-pipe, halfpipe, rink, ice rink, diving board, diving platform, trophy, medal, tennis
    net, batting cage, batting helmet, knee pad, kneepad, elbow pad, shin guard, sports equipment, baseball
    equipment, equipment, gear, ski gear, furniture, bedding, linen, laundry, fabric, cloth, cardboard,
    cardboard box, wood, plank, brick, lumber, pallet, metal, pebble, tarp, tape, glue, thread, yarn, needle,
    ball of yarn, basketball net, guitar, piano, violin, drum, trumpet, flute, saxophone, musical instrument,
    instrument, amplifier, record player, music stand, musical keyboard, cigarette, cigar, pipe, lighter,
    ashtray, match, umbrella stand, food, snack, fruit, vegetable, produce, banana, apple, orange, lemon, lime,
    grape, grapes, strawberry, blueberry, raspberry, cherry, peach, pear, plum, pineapple, mango, kiwi, melon,
    watermelon, cantaloupe, coconut, avocado, tomato, cherry tomato, potato, sweet potato, carrot, broccoli,
    cauliflower, cabbage, lettuce, spinach, kale, celery, cucumber, zucchini, squash, pumpkin, eggplant, pepper,
    bell pepper, chili pepper, jalapeno, onion, green onion, garlic, mushroom, olive, pickle, corn, pea, peas,
    bean, beans, green bean, asparagus, radish, beet, herb, basil, parsley, cilantro, salad, coleslaw, slaw,
    soup, stew, chili, curry, rice, pasta, noodle, spaghetti, macaroni, lasagna, ravioli, bread, bun, roll,
    bagel, toast, french toast, croissant, muffin, biscuit, pancake, waffle, pastry, pie, cake, birthday cake,
    wedding cake, cupcake, cheesecake, cookie, brownie, donut, doughnut, frosting, icing, sprinkle, sprinkles,
    chocolate, candy, ice cream, whipped cream, cream, pudding, yogurt, dessert, treat, sandwich, burger,
    hamburger, cheeseburger, hot dog, hotdog, corn dog, sausage, pepperoni, salami, ham, bacon, meat, beef,
    steak, pork, rib, chicken, chicken wing, turkey, meatball, salmon, tuna, shrimp, sushi, taco, burrito,
    quesadilla, tortilla, nacho, pizza, crust, cheese, mozzarella cheese, mozzarella, cheddar, egg, fried egg,
    omelet, omelette, tofu, fries, french fry, french fries, chip, chips, potato chip, potato chips, cracker,
    pretzel, popcorn, cereal, oatmeal, granola, nut, peanut, almond, walnut, sauce, meat sauce, tomato sauce,
    ketchup, mustard, mayonnaise, mayo, relish, salsa, guacamole, gravy, syrup, jam, jelly, honey, butter,
    peanut butter, oil, vinegar, dressing, salt, spice, seasoning, condiment, topping, ingredient, filling, dip,
    hummus, sugar, drink, beverage, milk, juice, orange juice, apple juice, lemonade, soda, coke, beer, wine,
    red wine, white wine, champagne, cocktail, coffee, tea, smoothie, milkshake, liquor, alcohol, liquid, straw,
    ice cube, toothpick, grill, barbecue, bbq, bouquet, grilled cheese sandwich, merchandise, tennis shoe, snow
    boot, hiking boot, rain boot, fire escape, phone, cell phone, telephone, cellphone, pay phone, headset,
    bridge, air, horseback, tennis attire, fire pit, bonfire, campfire, traffic, slice, tusk, shell, seashell,
    sandcastle, bone, dog bowl, dog bed, cat bed, litter box, bird feeder, birdhouse, birdcage, bird bath,
    feeder, trough, hay bale, bale, fencepost, medical equipment, hospital bed, iv, stethoscope, syringe, pill,
    first aid kit, wheel chair, name tag, name plate, nameplate, keypad, webpage, wallpaper, wii remote, stone
    element, cartoon character, decorative item, food item, plaque, monument, statue, gravestone, tombstone,
    cemetery, vendor stall, food stand, fruit stand, stand, newsstand, phone pole, tv stand, entertainment
    center, cash register, conveyor belt, conveyor, shopping cart, baggage claim, baggage, carousel,
    merry-go-round, ferris wheel, roller coaster, security camera, satellite dish, antenna, solar panel, wind
    turbine, water tower, smokestack, silo, tractor, plow, hydrangea, lily pad, reed, reeds, wheat, hillside,
    slope, snowbank, iceberg, glacier, volcano, horizon, pine tree, palm tree, pine cone, acorn, bed, book,
    clock, laptop, umbrella, bench, advertisement, banner, bath mat, bath towel, beach towel, beach chair, lawn
    chair, desk chair, office chair, folding chair, dining chair, desk lamp, table lamp, floor lamp, ceiling
    light, fruit bowl, salad bowl, mixing bowl, dining set, table setting, table surface, computer setup, dining
    setup, luggage set, tea set, bunch of bananas, snowboarder, kitesurfer,
    halfpipe""") - _words("""player piano, male, female, worker bee, air, landscape, horizon, neighborhood, home, general, model, senior,
    key, base, step, track field, bunch of bananas, match, cast, walker, captain, switch, slide, card, can,
    star, goal, staff""")  # noqa: E501
OBJECT_NOUNS |= _words("player, slide, card, can, goal, home plate, staff, track, keys")
"""Names of visible things, in the singular if they have one."""

MODIFIER_NOUNS = _words("""tennis, baseball, basketball, football, soccer, volleyball, hockey, golf, ski, snow,
    surf, skateboard,
    rugby, cricket, wedding, birthday, christmas, holiday, halloween, easter, passenger, freight, cargo,
    commuter, police, fire, traffic, street, road, city, town, village, country, mountain, garden, kitchen,
    bathroom, bedroom, bath, shower, toilet, office, school, hotel, hospital, airport, train, bus, car, truck,
    bicycle, bike, motorcycle, boat, airplane, computer, video, game, gaming, phone, tv, television, coffee,
    tea, wine, beer, water, orange, apple, fruit, vegetable, food, meat, cheese, chicken, fish, pizza,
    chocolate, vanilla, strawberry, tomato, potato, dinner, lunch, breakfast, picnic, restaurant, dining,
    cutting, parking, washing, swimming, shopping, cooking, fishing, sports, sport, diving, beach, dog, cat,
    horse, cow, bird, teddy, baby, pet, flower, plant, tree, pine, palm, grass, garbage, trash, towel, window,
    door, wall, floor, table, desk, bed, bar, counter, lamp, light, power, telephone, clock, church, bell,
    control, safety, space, storage, luggage, public transportation, transportation, medical, musical, cartoon,
    business, dress, suit, bow, polo, hoop, banana, corn, rice, olive, onion, pepper, mushroom, pepperoni, egg,
    bean, potted, stuffed, double-decker, double decker, ferry, race, racing, tour, tourist, military, army,
    navy, security, construction, work, road work, one-way street, laptop, pumpkin, bacon, ham, turkey, veggie,
    vegetarian, fruit juice, night, day, lunch, utility, electric, gas, oil, steam, diesel, ice, ski lift,
    chair, sofa, couch, bench, bottle, cup, bowl, plate""")
"""Words that begin names of things: "tennis" in "tennis court"."""

MATERIALS = _words("""wooden, wood, brick, metal, metallic, plastic, glass, paper, stone, rock, straw, leather,
    concrete, marble,
    granite, cement, steel, stainless steel, iron, wrought iron, aluminum, copper, brass, bronze, gold, golden,
    silver, ceramic, porcelain, tile, tiled, cardboard, rubber, fabric, cloth, cotton, wool, woolen, denim,
    silk, lace, velvet, linoleum, hardwood, wicker, bamboo, cobblestone, dirt, gravel, thatched, vinyl, chrome,
    foam, crystal, clay, asphalt, plaid, knit, knitted""")
COLORS = _words("""red, orange, yellow, green, blue, purple, pink, brown, black, white, gray, grey, beige, tan,
    turquoise,
    teal, maroon, navy, cream, violet, magenta, burgundy, lavender, khaki, blonde, blond, brunette,
    multicolored, multi-colored, colorful, rainbow, dark, bright, light, light-colored, dark-colored, brightly
    colored, light brown, dark brown, light blue, dark blue, light green, dark green, reddish, yellowish, dark
    gray, light gray, olive green, lime green, bright red, bright blue, bright green, bright yellow, bright
    orange, bright pink, hot pink, neon green, black-and-white, clear, pale, transparent, translucent""")
SIZES = _words("""large, larger, largest, big, bigger, biggest, small, smaller, smallest, tiny, little, huge,
    giant, massive,
    enormous, tall, taller, tallest, short, shorter, long, longer, high, higher, low, wide, wider, narrow,
    thick, thin, medium-sized, medium, mid-sized, full-sized, miniature, mini, oversized, sized, deep, shallow,
    towering, spacious, good-sized, full-length, plump, chubby, fat, skinny, slim""")
NUMBERS = _words("""one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen,
    fourteen, fifteen,
    twenty, thirty, dozen""")
STATES = _words("""young, younger, old, older, elderly, adult, middle-aged, teenage, newborn, baby, ancient,
    vintage, modern,
    antique, retro, old-fashioned, contemporary, rustic, round, square, rectangular, circular, oval, triangular,
    curved, flat, straight, pointed, pointy, curly, wavy, winding, steep, sloped, slanted, arched, crescent,
    cylindrical, spiral, convex, oblong, l-shaped, heart-shaped, u-shaped, striped, stripped, plaid, checkered,
    checked, spotted, polka dot, polka-dotted, polka dotted, dotted, floral, patterned, printed, flowered,
    embroidered, camouflage, camo, tie-dye, open, opened, closed, shut, empty, full, half-full, half-empty,
    half-eaten, broken, cracked, torn, damaged, rusty, rusted, dirty, clean, messy, cluttered, tidy, crowded,
    busy, wet, dry, dusty, muddy, sandy, grassy, snowy, icy, rocky, leafy, cloudy, overcast, sunny, foggy,
    snow-covered, snow covered, snow-capped, tree-lined, grass-covered, tree-covered, graffiti-covered, graffiti
    covered, covered, uncovered, shiny, glossy, smooth, rough, fuzzy, furry, fluffy, hairy, bald, bare,
    barefoot, shirtless, bearded, soft, sliced, chopped, diced, shredded, mashed, fried, grilled, baked,
    roasted, toasted, cooked, uncooked, raw, steamed, boiled, scrambled, melted, burnt, burned, iced, frosted,
    glazed, frozen, ripe, unripe, rotten, peeled, unpeeled, crispy, cut, folded, unfolded, framed, mounted,
    wall-mounted, exposed, fenced, fenced-in, paved, unpaved, cobbled, carpeted, painted, unpainted, polished,
    varnished, weathered, worn, worn-out, faded, abandoned, deserted, unfinished, bleached, stained, wrinkled,
    crumpled, lit, unlit, well-lit, dimly lit, illuminated, turned on, turned off, unmade, made, stacked,
    parked, potted, lush, dense, bushy, thorny, dead, dried, wilted, blooming, fallen, tattered, ripped,
    double-decker, two-story, two-tiered, three-wheeled, multi-tiered, three-tiered, three-tier, tiered,
    layered, two-tier, double, single-story, multi-story, white-tiled, red-haired, dark-haired, long-haired,
    short-haired, gray-haired, long-sleeved, short-sleeved, sleeveless, plain, ornate, wooden-framed, urban,
    rural, suburban, rural, sliding, spinning, revolving, folding, calm, choppy, wavy, rippling, still, blurry,
    blurred, blue-eyed, green-eyed, black-necked, long-necked, horned, spotted, woolly, shaggy, shaved, sheared,
    tusked, striped, pregnant, masked, uniformed, topless, naked, nude, blindfolded, smiling, laughing,
    sleeping, asleep, awake, alert, standing, seated, running, sprawled, docked, moored, anchored, airborne,
    flying, moving, casual, formal, tropical, electric, electronic, digital, analog, nude, healthy-looking,
    colored, black-colored, mixed, assorted, mid-flight, handwritten""")
ATTRIBUTES: frozenset[str] = MATERIALS | COLORS | SIZES | NUMBERS | STATES
"""Words for visible attributes."""

NON_OBJECTS = _words("""image, scene, photo, photograph, picture, view, close-up, background, foreground,
    distance, center, middle,
    side, left, right, top, bottom, edge, corner, end, front, back, rear, part, portion, section, area, areas,
    space, spot, position, location, place, setting, environment, atmosphere, ambiance, ambience, surrounding,
    surroundings, addition, presence, variety, assortment, selection, collection, array, arrangement, display,
    group, herd, flock, bunch, pair, row, line, pile, stack, set, series, piece, number, lot, plenty, amount,
    majority, rest, couple of, game, match, sport, tennis, baseball, soccer, football, basketball, frisbee game,
    hockey, golf, volleyball, skiing, snowboarding, surfing, skateboarding, boating, fishing, hiking, camping,
    cooking, baking, reading, writing, activity, action, event, celebration, party, wedding, ceremony,
    competition, race, trip, ride, journey, adventure, vacation, day, night, time, moment, morning, evening,
    afternoon, dusk, dawn, sunset, sunrise, daytime, nighttime, weather, sunlight, lighting, shade, shadow,
    reflection, color, colors, stripe, polka dots, spots, hue, tone, pattern, design, style, texture, shape,
    size, height, length, width, feature, element, detail, item, object, thing, stuff, contents, content,
    others, other, one, ones, everyone, someone, trick, jump, stunt, pose, posture, expression, smile, look,
    gaze, interest, attention, sense, feeling, touch, charm, beauty, interaction, conversation, meal, dinner,
    lunch, breakfast, brunch, feast, dining, meeting, performance, practice, session, haircut, word, words,
    text, writing, number, message, title, caption, name, brand, question, answer, description, story, use,
    purpose, need, task, job, work, progress, motion, movement, speed, balance, direction, way, course, sale,
    process, case, example, fact, experience, company, nature, life, world, season, winter, summer, spring,
    fall, autumn, era, period, century, year, air, mid-air, midair, line of sight, focus, subject, viewer,
    camera angle, type, kind, sort, form, version, fashion, manner, order, layer, backdrop of, selfie, livery,
    decor, look, theme, scheme, contrast, impression, appearance, combination, mixture, mix, entire, total,
    video game, video games, board game, service, support, control, safety, comfort, style, fetch, toys r us,
    trade, play, fun, enjoyment, joy, excitement, happiness, fort, flight, takeoff, landing""")
"""Nouns that are no visible things, and name the image, places in it, groups, events, times or qualities."""
PARTITIVES = _words("""group, crowd, bunch, herd, flock, pack, pair, couple, set, row, line, pile, stack,
    series, slice, piece,
    bit, variety, assortment, selection, collection, array, number, lot, plenty, handful, dozen, dozens,
    hundreds, team, family, cluster, school, swarm, gaggle, string, stream, layer, display, body, flight,
    arrangement, mixture, mix, part, portion, section, load, batch, sheet, head, type, kind, sort, form, loaf,
    stick, cut, wedge, chunk, strip, close-up, view, photo, picture, image, photograph, majority, rest, side,
    edge, top, middle, center, front, back, bottom, corner, end, one, two, three, four, some, most, many,
    several, all, each, none, both, bunches, slices, pieces, rows, stacks, piles, groups, pairs, lines, sets,
    half, quarter, spread, bundle, combination, abundance, fleet, sea, presence""")
"""Words before "of" that name an amount or a part: "a slice of pizza" is pizza."""
GROUPS = _words("""group, crowd, bunch, herd, flock, pack, pair, set, row, line, pile, stack, series, variety,
    assortment,
    selection, collection, array, number, team, family, cluster, groups, rows, lines, stacks, piles, couple""")
"""Amounts whose attributes are not those of their members: "a large group of people"."""

PREPOSITIONS = """on top of, in front of, in back of, in the middle of, in the center of, in the corner of,
    in the background
    of, in the foreground of, at the top of, at the bottom of, at the end of, at the edge of, on the edge of, on
    the side of, on the left side of, on the right side of, to the left side of, to the right side of, on the
    left of, on the right of, to the left of, to the right of, to the side of, on the back of, on the front of,
    on the bottom of, on the top of, on either side of, on each side of, on both sides of, on the other side of,
    on the opposite side of, towards the right side of, towards the left side of, toward the right side of,
    toward the left side of, towards the center of, towards the front of, towards the back of, near the edge of,
    near the center of, near the front of, near the back of, near the top of, near the bottom of, along the side
    of, along the edge of, around the edge of, at the side of, by the side of, in the back of, in the rear of,
    into the side of, out of, off of, next to, close to, closer to, adjacent to, across from, along with, close
    by, in between, on board, outside of, inside of, instead of, up to, up on, down on, out on, out in, over to,
    alongside, along, above, below, over, under, underneath, beneath, behind, beside, besides, between, among,
    amongst, amidst, around, across, against, at, by, down, up, from, in, inside, into, near, off, on, onto,
    outside, past, through, throughout, to, toward, towards, upon, with, within, of, for, without, about, atop,
    aboard, featuring, including, such as, like, surrounding, containing, as, during, after, before, through the
    middle of, in the center, a part of""".replace("\n", " ")
"""Prepositions, and phrases used like them."""

AUXILIARIES = _words("""is, are, was, were, be, been, being, am, appears, appear, appeared, seems, seem,
    seemed, looks like, can,
    could, may, might, must, will, would, should, do, does, did, has been, have been, had been""")
REPORT_VERBS = _words("""show, shows, shown, showing, showcase, showcases, showcasing, depict, depicts,
    depicting, display, feature,
    features, featuring, portray, portrays, portraying, capture, captures, illustrate, illustrates, present,
    presents, contain, contains, see, seen, visible, noticeable, observed, found, spotted, noticed, located in
    the image, viewed, featured, depicted, pictured, present, shown, captured, evident""")
"""Verbs and adjectives that report what an image shows."""
INVISIBLE_VERBS = _words("""enjoying, creating, making, giving, adding, suggesting, indicating, preparing,
    trying, appearing, seeming,
    capturing, ensuring, allowing, providing, contributing, offering, evoking, conveying, emphasizing,
    highlighting, enhancing, engaging, waiting to, having, getting, being, going, seeing, considering,
    reflecting, representing, demonstrating, showcasing, displaying, featuring, showing, depicting, portraying,
    illustrating, implying, hinting, expressing, including, containing, belonging, according, ranging, varying,
    depending, starting, beginning, completing, complementing, attracting, inviting, anticipating, planning,
    hoping, wanting, needing, using, taking part, experiencing, exploring, maintaining, keeping, letting,
    leaving, doing so, building, indulging, relaxing, occupying, participating, sharing, spending, accompanied,
    involved, focused, interested, engaged, engrossed, located, situated, positioned, placed, arranged,
    scattered, spread, distributed, dispersed, organized, associated, related, known, used, designed, intended,
    based, called, considered, believed, allowed, needed, required, expected, prepared, served, enjoyed, seen""")
"""Participles that are no visible action or posture."""
NOT_VERBS_IN_ING = _words("""building, ceiling, clothing, painting, railing, awning, wing, ring, string, king,
    morning, evening, wedding,
    living, dining, parking, swimming, washing, cutting, crossing, topping, frosting, icing, seating, setting,
    lighting, gathering, meeting, serving, dressing, seasoning, stuffing, filling, pudding, bedding, something,
    anything, nothing, everything, during, interesting, exciting, inviting, relaxing, amazing, stunning,
    charming, appealing, appetizing, welcoming, calming, surrounding, outstanding, heartwarming, entertaining,
    captivating, striking, contrasting, varying, refreshing, satisfying, comforting, winding, existing,
    remaining, missing, sling, spring, thing, herring, earring, sibling, duckling, gosling, plumbing, flooring,
    siding, paneling, molding, landing, offering, outing, feeling, drawing, engaging, inspiring, challenging,
    thrilling, fascinating, bustling, loving, mouthwatering, mouth-watering, including, featuring, containing,
    sterling, pressing, overwhelming, beginning, ending, opening, covering, marking, wrapping, packaging,
    towering, looming, skyscraping, breathtaking, eye-catching, half-smiling, fitting, matching, according,
    evening, gaming, bowling, racing""")
FINITE_VERBS = _words("""has, have, had, holds, hold, held, wears, wear, wore, sits, sit, sat, stands, stand,
    stood, lies, lie, lays,
    lay, rests, rest, rides, ride, rode, drives, drive, flies, fly, walks, walk, walked, runs, run, jumps, jump,
    plays, play, looks, look, watches, watch, eats, eat, drinks, drink, carries, carry, catches, catch, throws,
    throw, hits, hit, kicks, kick, swings, swing, serves, leads, lead, pulls, pull, pushes, push, hangs, hang,
    leans, lean, faces, face, travels, travel, crosses, cross, passes, moves, move, approaches, approach,
    surrounds, surround, covers, cover, overlooks, overlook, connects, connect, adorns, adorn, fills, fill,
    lines, includes, include, features, feature, contains, contain, displays, holding, supports, reads, read,
    uses, use, prepares, prepare, cooks, cook, cuts, cut, feeds, feed, brushes, brush, touches, touch, pets,
    grazes, graze, swims, swim, surfs, surf, skis, skates, skate, skateboards, performs, perform, does, poses,
    pose, talks, talk, speaks, speak, smiles, smile, sleeps, sleep, gathers, gather, takes, take, makes, works,
    work, waits, wait, pours, pour, pitches, blows, blow, lifts, reaches, reach, points, point, sails, sail,
    floats, float, navigates, navigate, chases, chase, tends, grabs, grab, attends, greets, hugs, kisses, licks,
    sniffs, bites, bite, chews, munches, munch, drags, herds, glides, glide, slides, slide, dives, dive, leaps,
    leap, soars, soar, perches, perch, kneels, kneel, crouches, crouch, bends, bend, stretches, stretch,
    extends, rises, descends, descend, climbs, climb, enters, enter, exits, boards, board, occupies, occupy,
    decorates, complements, accompanies, consists, features, showcases, tops, sports, dons, operates, steers,
    guides, examines, inspects, observes, observe, views, stares, gazes, peers, peer, offers, sells, sell, buys,
    hosts, houses, shares, shows, feature, stop, stops, stopped, parks, spans, dominates, frames, borders,
    flanks, encloses, shelters, shade, shades, balances""")
IRREGULAR_PARTICIPLES = _words("""worn, held, seen, shown, hung, lit, built, drawn, written, eaten, taken,
    driven, thrown, laid, spread,
    stuck, cut, set, caught, fed, led, sold, spun, swung, torn, woven, bent, bound, sat, left, strewn, ridden,
    blown, drunk, hit, put, split, shot, flown, made, done, gone, hidden, broken, surrounded, wrapped, dressed,
    clad, full, set up, laden""")
POSSESSIVES = _words("his, her, their, its, my, our, your, whose")
DETERMINERS = (
    _words("""a, an, the, this, that, these, those, some, several, many, few, multiple, numerous, various,
    other, another,
    each, every, both, all, any, no, more, different, certain, couple of, a couple of, pair of, only, same,
    such, additional, assorted, own""")
    | POSSESSIVES
)
PRONOUNS = _words("""he, she, it, they, them, him, his own, himself, herself, themselves, itself, we, us, i,
    you, others,
    someone, everyone, one another, each other, anyone, him, hers, theirs, who, whom, which, there, here, what,
    everything, something, nothing, both of them""")
SUBJECT_PRONOUNS = _words("he, she, it, they, we, i, you")
RELATIVES = _words("who, which, that, whom")
LINKS = _words("""while, as, where, when, whereas, although, though, because, since, if, but, so, then""")
EVENT_VERBS = _words("playing, doing, performing, taking, competing, practicing")
"""Verbs whose action is visible although their object is no thing: "playing tennis", "doing a trick"."""
SPORT_NAMES = _words("""tennis, baseball, soccer, football, basketball, frisbee, hockey, golf, volleyball,
    polo, cricket, rugby,
    badminton, wii, video games""")
DENIALS = _words("no, without, not, neither, nor, never, none")
