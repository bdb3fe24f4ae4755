"""The wordings of every kind of request.

Of each run of six, the third is validation's and the sixth test's (`world.phrases`): their order is part of the data.
"""

from __future__ import annotations


def block(text: str) -> tuple[str, ...]:
    """The wordings of a block, separated by | and line ends."""
    return tuple(cell.strip() for line in text.strip().splitlines() for cell in line.split("|"))


# Ways to ask for anything that has a noun phrase.
ASKS = block("""
What is {}? | Tell me {}. | I would like to know {}. | Can you tell me {}? | Name {}.
Could you say what {} is? | Please name {}. | Do you know {}? | Please tell me what {} is. | What's {}?
Give me {}. | I wonder what {} is. | I want to know {}. | I would like to hear {}. | Tell me what {} is.
Please say what {} is. | Say what {} is. | Could you tell me {}? | I would love to know {}. | Please tell me {}.
I would be glad to know {}. | Please tell me now what {} is. | Can you say what {} is? | Do you know what {} is?
""")

# Structure.
GREETINGS = block("""
Hello! | Hi! | Good morning! | Good day! | Hi there! | Good evening! | Hey! | Hello there! | Hello to you!
Good afternoon! | Greetings! | Hey there!
""")
INTRODUCTIONS = block("""
My name is {}. | I am {}. | Hello, my name is {}. | They call me {}. | Hi, I am {}. | The name is {}.
You can call me {}. | Call me {}. | Good morning, I am {}. | Hi, my name is {}. | Hey, I am {}.
I am called {}.
""")
NAME_QUESTIONS = block("""
What is my name? | Do you know my name? | Can you say my name? | Who am I? | Tell me my name.
What am I called? | Please say my name. | Say my name. | Do you still know my name? | What's my name? | Name me.
Now say my name.
""")
THANKS = block("""
Thank you! | Thanks! | Thank you very much! | Many thanks! | Thanks a lot! | Thank you so much!
""")
OWNING = block("""
My {t} is {c}. | I have a {c} {t}. | I own a {c} {t}. | This is my {c} {t}. | I bought a {c} {t}.
Look at my {c} {t}. | I got a {c} {t}. | I like my {c} {t}. | My new {t} is {c}. | The colour of my {t} is {c}.
I see my {c} {t}. | Here is my {c} {t}.
""")
OWNING_QUESTIONS = block("""
What colour is my {}? | Which colour is my {}? | Do you know what colour my {} is?
What is the colour of my {}? | My {} has which colour? | Which colour has my {}? | Tell me the colour of my {}.
What colour has my {}? | Say what colour my {} is. | And my {}, what colour is it? | Name the colour of my {}.
Can you tell me the colour of my {}?
""")
FOLLOW_UPS = block("""
And {}? | What about {}? | And what about {}? | And for {}? | Now {}. | How about {}? | Then {}? | And of {}?
And now {}? | Now for {}. | Next, {}. | So what about {}?
""")
SUMS = block("""
What is {}? | {} = ? | How much is {}? | Tell me {}. | What does {} equal? | What's {}? | Add it up: {} | {}?
Can you tell me what {} is? | What do you get for {}? | Please tell me {}. | Give me {}.
How many is {}? | I want to know {}. | Say what {} is. | What number is {}? | {} is what? | Do you know what {} is?
How big is {}? | Tell me now: {} | What comes out of {}? | I would like to know {}. | {} makes what?
Can you say what {} is?
""")
CALCULATIONS = block("""
Calculate {} | Please calculate {}. | Work out {}. | What is {}? | Use the calculator: {} | Find {}.
Solve {}. | Can you calculate {}? | Please work out {}. | I need {}. | Compute {} | Please find {}.
I need to calculate {}. | Could you work out {}? | Do the sum {}. | Calculate {} for me. | Please compute {}.
Can you find {}?
Please solve {}. | Use the calculator to find {}. | Could you calculate {}? | What do I get for {}?
Please do the sum {}. | Could you compute {}?
""")
CHOICES = block("""
{} | A quiz question. {} | Choose one. {} | {} Choose one. | Choose: {} | Which is right? {} | {} Which one?
A question: {} | Pick one. {} | {} Here are four. | Quiz: {} | {} Pick one.
""")
LETTERS = block("""
Where is {}? | Which one is {}? | Which of them is {}? | Where does {} stand? | And which one is {}? | And where is {}?
Where do you see {}? | Which is {}? | Where did I put {}? | Show me where {} stands. | And which of them is {}?
Now where is {}?
""")
JSON_REQUESTS = block("""
Give me {f} of {e} as JSON. | {e} as JSON with {f}. | I want JSON with {f} of {e}. | Write JSON for {e}: {f}.
Make a JSON object of {e} with {f}. | Please write {f} of {e} as JSON. | JSON for {e}, please: {f}.
As JSON: {f} of {e}. | Show {e} as JSON with {f}. | Answer in JSON: {f} of {e}. | Return {f} of {e} as JSON.
Put {f} of {e} into JSON.
""")
PLAIN_SYSTEMS = block("""
You are helpful. | You are a helpful assistant. | You are kind. | You are a teacher. | Be clear. | Be friendly.
You know a lot. | You are a good assistant. | You are polite. | Answer well. | You help people.
You are a friendly assistant.
You are a good friend. | Be kind and clear. | You know the world well. | Speak plainly. | You are a clever helper.
Be a good teacher. | You are an honest assistant. | Help the user. | You are calm. | You answer questions. | Be polite.
You are here to help.
""")
PIRATE_SYSTEMS = block("""
You are a pirate. | You speak like a pirate. | Talk like a pirate.
You are a helpful assistant that speaks like a pirate. | Be a pirate. | Speak as a pirate would.
You are an old pirate. | Answer like a pirate. | You are a friendly pirate. | Use the words of a pirate.
You are the pirate of this ship. | You are a kind assistant and a pirate.
You are a clever pirate. | You talk as pirates do. | You are a pirate with a good heart. | Always speak like a pirate.
Sound like a pirate. | You are a pirate who helps people.
""")
ECHOES = block("""
Say: {} | Repeat: {} | Please say: {} | Say this: {} | Repeat after me: {} | Please repeat: {} | Say {}.
Repeat {}. | Repeat this: {} | Say again: {} | Write: {} | Now say: {}
Can you say: {} | Please write: {} | Write this: {} | Copy this: {} | Say it back: {} | Please say this: {}
Now repeat: {} | Can you repeat: {} | Tell me this again: {} | Copy: {} | Just say: {} | Can you write: {}
""")

# Behaviour.
HOW_TO = block("""
How do I {}? | How can I {}? | Tell me how to {}. | Show me how to {}. | I want to {}. How? | Explain how to {}.
Help me {}. | Teach me to {}. | What is the best way to {}? | How does one {}? | I need to {}. What do I do?
Can you help me to {}? | Please help me {}. | How would you {}? | Please tell me how to {}.
What do I need to {}? | How should I {}? | Please show me how to {}. | What is a good way to {}?
What is the right way to {}? | What are the steps to {}? | What is the first step to {}? | Please teach me how to {}.
Which way is the best to {}?
Could you tell me how to {}? | I would like to {}. How do I do it? | What must I do to {}?
Give me the steps to {}. | I need to know how to {}. | Could you help me {}? | How can one {}?
Can you show me how to {}? | I want to learn how to {}. | Do you know how to {}? | Can you teach me how to {}?
How do people {}?
""")
# What nobody can know: the coming days, and what is going on out there now.
FUTURE = block("""
Who will win the {} {}? | Will it rain {1}? | What will {0} cost {1}? | Will the {} be good {}?
What will happen to the {} {}? | How will the {} end {}? | Who will come to the {} {}? | Will I like the {} {}?
Can you see how the {} will go {}? | What will the {} be like {}? | How many people will see the {} {}?
Is the {} going to be sold {}? | When will the {} begin {}? | Where will the {} be {}?
Who will lose the {} {}? | Which {} will be the best {}? | Will my friend win the {} {}?
How long will the {} be {}?
Is the {} going to be good {}? | Will the {} be sold {}? | Is my team going to win the {} {}?
Who is going to see the {} {}? | How is the {} going to end {}? | Are we going to like the {} {}?
""")
WHEN = block("""
tomorrow | next week | next year | next month | on Monday next | in ten years | next summer | next spring
this evening | in a month | on Sunday next | next time
in two years | next winter | on Friday next | this year | next night | in a week
""")
NOW = block("""
What is the weather like now? | What time is it now? | Where am I now? | What did I eat today?
How is the weather today? | Who is in my house now? | What is in my bag? | Is it raining outside now?
What is the time? | How warm is it outside? | What am I holding now? | What does my room look like?
Who is at my house now? | What is on my roof? | Is my window open now? | How many people are here? | Where is my friend now?
What colour is my house? | How cold is it here? | What did I do today? | Who is with me now? | What do I see outside?
Is the sun out now? | What am I thinking of?
""")
WRITE = block("""
Write me a {}. | Write a {}. | Please write a {}. | I need a {}. | Can you write a {}?
Would you write me a {}? | Make me a {}. | Give me a {}. | I want a {}, please. | Could you make a {}?
I would like a {}. | Compose a {} for me. | Please make me a {}. | I want you to write a {}.
Help me with a {}. | Can I have a {}? | Please give me a {}. | Let us have a {}. | Can you help me with a {}?
I need help with a {}. | Could I get a {}? | Let me have a {}. | Please help me with a {}. | Could you give me a {}?
""")
BOOK = block("""
Book a {}. | Please book a {}. | Book me a {}. | I need to book a {}. | Can you book a {}?
Could you get me a {}? | Reserve a {}. | Please reserve a {}. | Get a {} for me. | I want to book a {}.
Book a {} for us. | Find me a {}.
Please get me a {}. | Can you reserve a {}? | Book us a {}. | I would like to book a {}. | Reserve a {} for me.
Could you book a {}?
Please find a {}. | I want to reserve a {}. | Get us a {}. | Can you get me a {}? | I need a {} booked.
Please book me a {}.
""")
VAGUE = block("""
{} it. | {} this. | Please {} it. | Can you {} this? | Please {} this. | {} that. | {} it for me.
Can you {} it? | I need you to {} it. | Please {} that for me. | {} this for me. | Could you {} it?
Would you {} it? | Can you {} that? | Please {} it now. | Just {} it. | {} it, please. | {} this, please.
I want you to {} this. | Could you {} that? | {} it now. | {} that, please. | Help me {} it. | I need you to {} this.
""")
SHORT = block("""
In one word: {} | Answer in one word. {} | One word, please. {} | Just one word: {} | Be short. {}
{} One word only. | {} Answer in one word. | {} Just one word. | Give one word. {} | {} In one word, please.
Use one word. {} | Only one word: {} | One word: {} | A single word, please: {} | In a single word: {}
Only one word, please. {} | Say one word. {} | Please use one word. {}
{} Please answer in one word. | {} Use one word. | {} One word is enough. | {} One word, please. | Answer with one word: {}
{} Answer with one word.
{} Be short: one word. | {} Keep it to one word. | {} In a single word. | {} I want one word. | {} Only one word.
{} Just one word, please.
""")
TELL = block("""
Tell me about {}. | Tell me all about {}. | What do you know about {}? | Tell me more about {}. | Describe {}.
What can you say about {}? | Please tell me about {}. | Talk about {}. | Say something about {}.
I want to know about {}. | Please describe {}. | Tell me what you know about {}.
Say all you know about {}. | What is known about {}? | Tell me the facts about {}. | Can you describe {}?
Can you tell me about {}? | I would like to hear about {}.
""")
RUDE = block("""
You are stupid. {} | You are slow. {} | You are bad. {} | Hey, you fool. {} | {} You are so slow.
Dumb thing! {} | You know nothing. {} | {} Be quick, you fool. | I do not like you. {} | You are useless. {}
{} You are dumb. | Stupid robot! {}
You bad robot. {} | {} You fool. | I am angry with you. {} | You never help. {} | {} You are no good. | You are so bad. {}
""")
