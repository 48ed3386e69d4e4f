//! Goal: every law of the accounting holds after every step, nobody starves, and no answer depends on who shared the pool.
//! Method: a pretend model whose next token is a hash of the tokens it can see through the blocks. It reads a sequence's tokens only
//! through the block table, from a pretend cache that is written as a plan says; so a block that was handed out twice, overwritten
//! while shared, or found under a wrong prefix changes a token, and the answer differs from the one computed alone. Most worlds guess
//! at next tokens, now right and now wrong, also past the ends of answers; wrong ones stand in the pretend cache until they are
//! overwritten, so one that is read, or sealed, changes an answer too. In many worlds crowds come in one step with prompts that begin
//! alike: what one has computed, or computes in this step, no other computes, and who waits for it has it in the next step.

use std::collections::{BTreeMap, HashMap, HashSet};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tidegate_node::{
    kv::{BLOCK_TOKENS, Counts},
    sched::{Cause, Class, Limits, Owner, Piece, Plan, Scheduler, SeqId, Sequence, States, Terms},
};

const WORLDS: u64 = 3000;

/// Rows in a step of all sequences that ask for all logits.
const LOGIT_ROWS_MAX: usize = 32;

#[test]
fn the_laws_hold_in_every_world() {
    let tallies = super::in_every_world(WORLDS, |seed| World::new(seed).run());
    let all = tallies.iter().fold(Tally::default(), |a, b| a.and(b));
    println!("{} worlds: {all:?}", tallies.len());
    let worlds = tallies.len();
    if worlds > 100 {
        assert!(all.for_blocks > worlds / 2 && all.for_share > worlds / 2, "the worlds are too easy to show anything");
        assert!(all.cached > 100 * worlds && all.left > worlds && all.late > worlds, "{all:?}");
        assert!(all.awaited > worlds, "{all:?}");
        assert!(all.accepted > 50 * worlds && all.proposed - all.accepted > 50 * worlds, "{all:?}");
    }
}

/// What a world came to.
#[derive(Debug, Default)]
struct Tally {
    requests: usize,
    steps: usize,
    computed: usize,
    looked_up: usize,
    cached: usize,
    /// Times that a sequence waited a step for a block that another computes.
    awaited: usize,
    proposed: usize,
    accepted: usize,
    for_blocks: usize,
    for_share: usize,
    left: usize,
    late: usize,
    longest_wait: usize,
}

impl Tally {
    fn and(self, other: &Self) -> Self {
        Self {
            requests: self.requests + other.requests,
            steps: self.steps + other.steps,
            computed: self.computed + other.computed,
            looked_up: self.looked_up + other.looked_up,
            cached: self.cached + other.cached,
            awaited: self.awaited + other.awaited,
            proposed: self.proposed + other.proposed,
            accepted: self.accepted + other.accepted,
            for_blocks: self.for_blocks + other.for_blocks,
            for_share: self.for_share + other.for_share,
            left: self.left + other.left,
            late: self.late + other.late,
            longest_wait: self.longest_wait.max(other.longest_wait),
        }
    }
}

/// The pretend model: the next token after `tokens`.
fn next_token(tokens: impl Iterator<Item = u32>) -> u32 {
    let hash = tokens.fold(0xcbf2_9ce4_8422_2325u64, |h, t| (h ^ u64::from(t)).wrapping_mul(0x100_0000_01b3));
    (hash >> 40) as u32 % 50
}

struct Request {
    arrives: usize,
    owner: Owner,
    terms: Terms,
    prompt: Vec<u32>,
    tokens_max: usize,
    /// After this many tokens the client leaves.
    leaves_after: Option<usize>,
    /// In this step its time is over, wherever it is.
    deadline: Option<usize>,
}

impl Request {
    fn tokens(&self) -> usize {
        self.prompt.len() + self.tokens_max
    }
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Whole,
    Left,
    Late,
}

/// One that has arrived and not ended.
struct Open {
    answer: Vec<u32>,
    /// Position of its next piece, once it runs.
    next: Option<usize>,
    has_run: bool,
    /// Tokens of all that were there beside it, and so the longest that it may wait.
    load: usize,
    waited: usize,
}

struct World {
    limits: Limits,
    scheduler: Scheduler,
    /// What stands in each slot of the pretend cache.
    cache: Vec<Option<u32>>,
    requests: Vec<Request>,
    /// How likely a sequence is guessed at in a step, and how likely each guess is right.
    guesses: (f64, f64),
    rng: StdRng,
    /// Oldest first.
    open: BTreeMap<SeqId, Open>,
    ended: HashMap<SeqId, (End, Vec<u32>)>,
    /// Who waits for a block that this step computes, and how many tokens it has of its own when it takes it.
    awaiting: Vec<(SeqId, usize)>,
    tally: Tally,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let (batch_size_max, is_crowd) = (rng.random_range(1..12), rng.random_bool(0.3));
        let tokens_more = rng.random_range(0..if is_crowd { 600 } else { 80 });
        let limits = Limits { batch_size_max, batch_tokens_max: batch_size_max + tokens_more };
        let (prompt_max, tokens_max) = (rng.random_range(2..if is_crowd { 300 } else { 100 }), rng.random_range(1..80));
        // at least one sequence of full length must fit
        let spare = rng.random_range(0..if is_crowd { 100 } else { 12 });
        let blocks = (prompt_max + tokens_max) / BLOCK_TOKENS + 1 + spare;
        let mut shared = text(&mut rng, prompt_max);
        let (tenants, rush) = (rng.random_range(1..6), rng.random_range(1..8));
        let mut arrives = 0;
        let requests = (0..rng.random_range(5..60)).map(|_| {
            if !is_crowd {
                arrives += rng.random_range(0..rush);
            } else if rng.random_bool(0.15) {
                // the next crowd, with another beginning
                arrives += rng.random_range(1..30);
                shared = text(&mut rng, prompt_max);
            }
            let len = rng.random_range(1..=prompt_max);
            // many prompts begin alike, so the prefix cache is used
            let alike = rng.random_range(if is_crowd { len / 2 } else { 0 }..=len);
            let prompt = (0..len).map(|i| if i < alike { shared[i] } else { rng.random_range(0..50) }).collect();
            let leaves_after = rng.random_bool(0.15).then(|| rng.random_range(0..tokens_max + 1));
            let deadline = rng.random_bool(0.15).then(|| arrives + rng.random_range(0..60));
            let (owner, terms) = (owner(&mut rng, tenants), terms(&mut rng));
            Request {
                arrives,
                owner,
                terms,
                prompt,
                tokens_max: rng.random_range(1..=tokens_max),
                leaves_after,
                deadline,
            }
        });
        let requests: Vec<Request> = requests.collect();
        let guesses = if seed.is_multiple_of(4) { (0.0, 0.0) } else { (rng.random(), rng.random()) };
        Self {
            scheduler: Scheduler::new(limits, blocks),
            cache: vec![None; blocks * BLOCK_TOKENS],
            open: BTreeMap::new(),
            ended: HashMap::new(),
            awaiting: Vec::new(),
            tally: Tally { requests: requests.len(), ..Tally::default() },
            limits,
            requests,
            guesses,
            rng,
        }
    }

    fn run(mut self) -> Tally {
        let mut arrived = 0;
        for step in 0.. {
            while arrived < self.requests.len() && self.requests[arrived].arrives <= step {
                self.arrive(SeqId(arrived as u64));
                arrived += 1;
            }
            self.let_some_go(step);
            let mut plan = self.scheduler.plan();
            self.check_plan(&plan);
            self.check_waits();
            self.guess(&mut plan);
            self.step(&plan);
            self.check_books();
            self.tally.steps += 1;
            if arrived == self.requests.len() && self.open.is_empty() {
                return self.finish();
            }
        }
        unreachable!("a world without an end would break the bound of some wait");
    }

    fn arrive(&mut self, id: SeqId) {
        let request = &self.requests[id.0 as usize];
        let beside: usize = self.open.keys().map(|other| self.requests[other.0 as usize].tokens()).sum();
        self.open.values_mut().for_each(|other| other.load += request.tokens());
        let load = beside + request.tokens();
        self.open.insert(id, Open { answer: Vec::new(), next: None, has_run: false, load, waited: 0 });
        self.scheduler.add(id, request.prompt.clone(), request.terms, request.owner.clone());
    }

    /// Clients leave and deadlines pass, between steps.
    fn let_some_go(&mut self, step: usize) {
        let going: Vec<(SeqId, End)> = self
            .open
            .iter()
            .filter_map(|(id, open)| {
                let request = &self.requests[id.0 as usize];
                let leaves = request.leaves_after.is_some_and(|after| open.answer.len() >= after);
                let is_late = request.deadline.is_some_and(|deadline| deadline <= step);
                if leaves { Some((*id, End::Left)) } else { is_late.then_some((*id, End::Late)) }
            })
            .collect();
        for (id, end) in going {
            self.end(id, end);
            // what only it used is free at once
            self.check_books();
        }
    }

    fn end(&mut self, id: SeqId, end: End) {
        assert!(self.scheduler.remove(id), "an open sequence is known");
        assert!(!self.scheduler.remove(id), "and after its end it is not");
        let open = self.open.remove(&id).expect("only what is open ends");
        self.tally.left += usize::from(end == End::Left);
        self.tally.late += usize::from(end == End::Late);
        assert!(self.ended.insert(id, (end, open.answer)).is_none(), "request {} ended twice", id.0);
    }

    /// Within the bounds, each sequence once, all that could be computed, and no block written that another sequence uses.
    fn check_plan(&mut self, plan: &Plan) {
        for (id, cause) in &plan.preempted {
            self.open.get_mut(id).expect("only what is open is put back").next = None;
            match cause {
                Cause::Blocks => self.tally.for_blocks += 1,
                Cause::Share => self.tally.for_share += 1,
            }
        }
        self.tally.looked_up += plan.tokens_looked_up;
        self.tally.cached += plan.tokens_cached;
        assert!(self.tally.cached <= self.tally.looked_up, "more was found than was looked for");
        self.tally.computed += plan.tokens();
        let left =
            self.limits.batch_tokens_max.checked_sub(plan.tokens()).expect("no more tokens than a step may have");
        assert!(self.scheduler.running() <= self.limits.batch_size_max);
        assert_eq!(self.scheduler.running() + self.scheduler.waiting(), self.open.len());
        assert!(!plan.pieces.is_empty() || self.open.is_empty(), "there is work, and none of it is planned");
        self.check_awaited(plan);
        self.check_computed_once(plan);
        let lens: HashMap<SeqId, usize> = plan.pieces.iter().map(|piece| (piece.seq, piece.len)).collect();
        assert_eq!(lens.len(), plan.pieces.len(), "a sequence has one piece");
        let asked = |piece: &&Piece| {
            self.scheduler.sequence(piece.seq).is_some_and(|s| s.terms().all_logits && s.pending() > 1)
        };
        let logit_rows: usize = plan.pieces.iter().filter(asked).map(|piece| piece.len).sum();
        assert!(logit_rows <= LOGIT_ROWS_MAX, "{logit_rows} rows of logits in a step");
        for (id, open) in &mut self.open {
            let Some(sequence) = self.scheduler.sequence(*id) else { continue };
            let (len, could) = (lens.get(id).copied().unwrap_or(0), sequence.pending());
            let is_bounded = left == 0 || (sequence.terms().all_logits && logit_rows == LOGIT_ROWS_MAX);
            let waits = len == 0 && self.awaiting.iter().any(|(other, _)| other == id);
            let is_short = could > 1 && (is_bounded || waits);
            assert!(len == could || is_short, "{len} of {could} tokens, and {left} left in the step");
            assert!(len <= could);
            open.has_run = true;
        }
        for piece in &plan.pieces {
            self.check_piece(piece);
        }
    }

    /// Who waited for a block that the last step computed has it.
    fn check_awaited(&mut self, plan: &Plan) {
        for (id, computed) in &self.awaiting {
            let Some(sequence) = self.scheduler.sequence(*id) else { continue };
            let begun_anew = plan.preempted.iter().any(|(other, _)| other == id);
            assert!(begun_anew || computed_of(sequence) >= *computed, "request {} waited in vain", id.0);
        }
        self.awaiting = self.awaiting(plan);
        self.tally.awaited += self.awaiting.len();
    }

    /// Who has no piece, and finds its next block among those that the plan fills.
    fn awaiting(&self, plan: &Plan) -> Vec<(SeqId, usize)> {
        let planned: HashSet<SeqId> = plan.pieces.iter().map(|piece| piece.seq).collect();
        let filled: HashSet<&[u32]> = plan.pieces.iter().flat_map(|piece| self.filled(piece)).collect();
        let next = |id: &SeqId| {
            let sequence = self.scheduler.sequence(*id).filter(|s| !is_uncached(s.terms()))?;
            let end = (computed_of(sequence) / BLOCK_TOKENS + 1) * BLOCK_TOKENS;
            let is_found = end < sequence.tokens().len() && filled.contains(&sequence.tokens()[..end]);
            is_found.then_some((*id, end))
        };
        self.open.keys().filter(|id| !planned.contains(id)).filter_map(next).collect()
    }

    /// No full block is computed that another running sequence has, or fills in the same step; but for what is read off, and the block
    /// of a sequence's last token, which is always computed. Blocks are told apart by all tokens up to their end.
    fn check_computed_once(&self, plan: &Plan) {
        let running = self.open.keys().filter_map(|id| self.scheduler.sequence(*id));
        let mut had: HashSet<&[u32]> = running.flat_map(|s| full_blocks(s, 0, computed_of(s))).collect();
        for piece in &plan.pieces {
            let sequence = self.scheduler.sequence(piece.seq).expect("a planned sequence runs");
            for block in self.filled(piece) {
                let must = is_uncached(sequence.terms()) || block.len() == last_block_end(sequence);
                assert!(had.insert(block) || must, "request {} computes a block that another has", piece.seq.0);
            }
        }
    }

    /// The blocks that a piece makes full, each as all tokens up to its end.
    fn filled(&self, piece: &Piece) -> impl Iterator<Item = &[u32]> {
        let sequence = self.scheduler.sequence(piece.seq).expect("a planned sequence runs");
        full_blocks(sequence, piece.start, piece.start + piece.known())
    }

    fn check_piece(&mut self, piece: &Piece) {
        let sequence = self.scheduler.sequence(piece.seq).expect("a planned sequence runs");
        let open = self.open.get_mut(&piece.seq).expect("a planned sequence is open");
        let uncached = is_uncached(sequence.terms());
        match open.next {
            Some(next) if piece.start > next && !uncached => {
                assert!(piece.start.is_multiple_of(BLOCK_TOKENS), "what another computed is whole blocks");
            }
            Some(next) => assert_eq!(piece.start, next, "pieces follow one another"),
            None if uncached => assert_eq!(piece.start, 0, "what must be read off is computed"),
            None => assert!(piece.start.is_multiple_of(BLOCK_TOKENS), "a cached prefix is whole blocks"),
        }
        open.next = Some(piece.start + piece.len);
        self.check_slots(piece);
    }

    fn check_slots(&self, piece: &Piece) {
        let sequence = self.scheduler.sequence(piece.seq).expect("a planned sequence runs");
        for position in piece.start..piece.start + piece.len {
            let block = sequence.blocks()[position / BLOCK_TOKENS];
            assert_eq!(self.scheduler.kv().references(block), 1, "a shared block would be written");
        }
    }

    /// Guesses for some of those that decode, within what nobody else wants.
    fn guess(&mut self, plan: &mut Plan) {
        let decoding: Vec<SeqId> = plan.pieces.iter().filter(|p| p.samples && p.len == 1).map(|p| p.seq).collect();
        for id in decoding {
            if !self.rng.random_bool(self.guesses.0) {
                continue;
            }
            let guesses = self.guesses_at(id);
            let (planned, available) = (plan.clone(), self.scheduler.kv().available());
            let count = self.scheduler.propose(plan, id, &guesses);
            let sequence = self.scheduler.sequence(id).expect("a planned sequence runs");
            assert_eq!(sequence.proposed(), &guesses[..count]);
            assert!(count == 0 || (planned.only_decodes() && sequence.terms() == Terms::default()));
            assert_eq!((&plan.preempted, plan.tokens()), (&planned.preempted, planned.tokens() + count));
            let left = self.scheduler.kv().available();
            assert!(
                left == available || left >= self.scheduler.running(),
                "a guess took a block that another may need"
            );
            self.tally.proposed += count;
        }
        assert!(plan.tokens() <= self.limits.batch_tokens_max && plan.proposed() <= LOGIT_ROWS_MAX);
        plan.pieces.iter().for_each(|piece| self.check_slots(piece));
    }

    /// Tokens after a sequence's last, each right or not as chance has it.
    fn guesses_at(&mut self, id: SeqId) -> Vec<u32> {
        let mut tokens = self.scheduler.sequence(id).expect("a planned sequence runs").tokens().to_vec();
        let known = tokens.len();
        for _ in 0..self.rng.random_range(1..40) {
            let right = next_token(tokens.iter().copied());
            tokens.push(if self.rng.random_bool(self.guesses.1) { right } else { self.rng.random_range(0..50) });
        }
        tokens.split_off(known)
    }

    /// Nobody waits longer than all that was there beside it takes at one token a step and computed twice over; and within a share
    /// nobody is passed by a younger one.
    fn check_waits(&mut self) {
        let mut waiting: HashSet<&Owner> = HashSet::new();
        for (id, open) in &mut self.open {
            let owner = &self.requests[id.0 as usize].owner;
            match self.scheduler.sequence(*id) {
                Some(_) => assert!(!waiting.contains(owner), "request {} passed an older one of its share", id.0),
                None => {
                    open.waited += 1;
                    waiting.insert(owner);
                }
            }
            assert!(
                open.waited <= 2 * open.load,
                "request {} waits for {} steps; all there is are {} tokens",
                id.0,
                open.waited,
                open.load
            );
            self.tally.longest_wait = self.tally.longest_wait.max(open.waited);
        }
    }

    /// Writes the plan's tokens to the pretend cache, and reads whole sequences back through their block tables.
    fn step(&mut self, plan: &Plan) {
        for piece in &plan.pieces {
            let sequence = self.scheduler.sequence(piece.seq).expect("a planned sequence runs");
            let known = sequence.tokens()[piece.start..piece.start + piece.known()].iter();
            let tokens: Vec<u32> = known.chain(sequence.proposed()).copied().collect();
            assert_eq!(tokens.len(), piece.len, "guesses are those of this step");
            for (position, token) in (piece.start..).zip(tokens) {
                let slot = self.slot(piece.seq, position);
                self.cache[slot] = Some(token);
            }
        }
        let sampled: Vec<(SeqId, Vec<u32>)> =
            plan.pieces.iter().filter(|p| p.samples).map(|p| (p.seq, self.sample(p))).collect();
        self.scheduler.advance(plan);
        for (id, tokens) in sampled {
            self.tally.accepted += tokens.len() - 1;
            self.take(id, &tokens);
        }
    }

    /// What comes after each of a piece's rows, until a guess is wrong.
    fn sample(&self, piece: &Piece) -> Vec<u32> {
        let guesses = self.scheduler.sequence(piece.seq).expect("a planned sequence runs").proposed();
        let mut sampled = Vec::new();
        for rows in piece.known()..=piece.len {
            let slots = (0..piece.start + rows).map(|i| self.slot(piece.seq, i));
            sampled.push(next_token(slots.map(|slot| self.cache[slot].expect("what is read was written"))));
            if guesses.get(sampled.len() - 1) != sampled.last() {
                break;
            }
        }
        sampled
    }

    /// A sequence's next tokens; those after its end are nobody's.
    fn take(&mut self, id: SeqId, tokens: &[u32]) {
        for token in tokens {
            let open = self.open.get_mut(&id).expect("a sampled sequence is open");
            open.answer.push(*token);
            if open.answer.len() == self.requests[id.0 as usize].tokens_max {
                return self.end(id, End::Whole);
            }
            self.scheduler.push(id, *token);
        }
        let pending = self.scheduler.pending(id);
        assert_eq!(pending, 1, "only the newest token is not computed");
        self.open.get_mut(&id).expect("it has not ended").next =
            self.scheduler.sequence(id).map(|sequence| sequence.tokens().len() - pending);
    }

    fn slot(&self, id: SeqId, position: usize) -> usize {
        let block = self.scheduler.sequence(id).expect("a planned sequence runs").blocks()[position / BLOCK_TOKENS];
        block.0 as usize * BLOCK_TOKENS + position % BLOCK_TOKENS
    }

    fn check_books(&self) {
        let kv = self.scheduler.kv();
        let Counts { free, referenced, cached } = kv.counts();
        assert_eq!(free + referenced + cached, kv.len(), "free + referenced + cached = all");
        let running = self.open.keys().filter_map(|id| self.scheduler.sequence(*id));
        let used: HashSet<_> = running.flat_map(|sequence| sequence.blocks()).collect();
        assert_eq!(used.len(), referenced, "blocks are referenced by those who run, and by nobody else");
    }

    /// Every request ended once, every answer is the one computed alone, every block came back, and nothing was put back for nothing.
    fn finish(self) -> Tally {
        assert_eq!(self.ended.len(), self.requests.len());
        for (id, (end, answer)) in &self.ended {
            let request = &self.requests[id.0 as usize];
            let mut tokens = request.prompt.clone();
            for token in answer {
                let alone = next_token(tokens.iter().copied());
                assert_eq!(*token, alone, "request {} got another answer in company", id.0);
                tokens.push(*token);
            }
            assert!(*end != End::Whole || answer.len() == request.tokens_max, "request {} has no whole answer", id.0);
        }
        assert_eq!(self.scheduler.kv().counts().referenced, 0, "every block came back");
        let tally = &self.tally;
        let answered: usize = self.ended.values().map(|(_, answer)| answer.len()).sum();
        let grown = answered / BLOCK_TOKENS + tally.requests;
        assert!(tally.for_blocks <= grown, "{} put back for {grown} blocks grown", tally.for_blocks);
        let changes = 2 * tally.requests + tally.for_blocks;
        assert!(tally.for_share <= changes, "{} put back for {changes} changes of who is there", tally.for_share);
        self.tally
    }
}

fn computed_of(sequence: &Sequence) -> usize {
    sequence.tokens().len() - sequence.pending()
}

/// What is read off a sequence's rows must be computed.
fn is_uncached(terms: Terms) -> bool {
    terms.all_logits || terms.states == States::All
}

/// Where the block of its last token ends.
fn last_block_end(sequence: &Sequence) -> usize {
    sequence.tokens().len().next_multiple_of(BLOCK_TOKENS)
}

/// The blocks that become full between two positions, each as all tokens up to its end.
fn full_blocks(sequence: &Sequence, start: usize, end: usize) -> impl Iterator<Item = &[u32]> {
    (start / BLOCK_TOKENS + 1..=end / BLOCK_TOKENS).map(|count| &sequence.tokens()[..count * BLOCK_TOKENS])
}

fn text(rng: &mut StdRng, len: usize) -> Vec<u32> {
    (0..len).map(|_| rng.random_range(0..50)).collect()
}

/// The first tenant sends half of all.
fn owner(rng: &mut StdRng, tenants: usize) -> Owner {
    let tenant = if rng.random_bool(0.5) { 0 } else { rng.random_range(0..tenants) };
    let class = if rng.random_bool(0.6) { Class::Normal } else { Class::ALL[rng.random_range(0..3)] };
    Owner { tenant: format!("tenant {tenant}").into(), class }
}

fn terms(rng: &mut StdRng) -> Terms {
    let states = match rng.random_range(0..10) {
        0 => States::Last,
        1 => States::All,
        _ => States::None,
    };
    Terms { all_logits: rng.random_bool(0.1), states }
}
