//! Seeded simulation of scheduler and KV pool: thousands of random requests with cancels, in worlds of random sizes.
//!
//! Goal: every law of the accounting holds after every step, nobody starves, and no answer depends on who shared the pool.
//! Method: a pretend model whose next token is a hash of the tokens it can see through the blocks. It reads a sequence's tokens only
//! through the block table, from a pretend cache that is written as a plan says; so a block that was handed out twice, overwritten
//! while shared, or found under a wrong prefix changes a token, and the answer differs from the one computed alone.
//! Each world prints its seed when it fails; `TIDEGATE_SIM_SEED=n` runs that world alone, `TIDEGATE_SIM_REQUESTS` sets how many requests.

use std::collections::{HashMap, HashSet};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tidegate_node::{
    kv::{BLOCK_TOKENS, Counts},
    sched::{Limits, Plan, Scheduler, SeqId, Terms},
};

/// Requests of all worlds together.
const REQUESTS: usize = 10_000;

/// Requests of one world.
const REQUESTS_A_WORLD: usize = 200;

/// Steps after which a world is said to be stuck.
const STEPS_MAX: usize = 200_000;

#[test]
fn the_laws_hold_in_every_world() {
    if let Some(seed) = number("TIDEGATE_SIM_SEED") {
        World::new(seed as u64).run();
        return;
    }
    let worlds = number("TIDEGATE_SIM_REQUESTS").unwrap_or(REQUESTS).div_ceil(REQUESTS_A_WORLD);
    let (mut preempted, mut cached) = (0, 0);
    for seed in 0..worlds as u64 {
        let Ok(tally) = std::panic::catch_unwind(|| World::new(seed).run()) else {
            panic!("the world of seed {seed} broke a law; run it alone with TIDEGATE_SIM_SEED={seed}");
        };
        preempted += tally.0;
        cached += tally.1;
    }
    println!(
        "{worlds} worlds of {REQUESTS_A_WORLD} requests: {preempted} preemptions, {cached} tokens from the prefix cache"
    );
    assert!(preempted > worlds && cached > 100 * worlds, "the worlds are too easy to show anything");
}

fn number(name: &str) -> Option<usize> {
    std::env::var(name).ok()?.parse().ok()
}

/// The pretend model: the next token after `tokens`.
fn next_token(tokens: &[u32]) -> u32 {
    let hash = tokens.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, t| (h ^ u64::from(*t)).wrapping_mul(0x100_0000_01b3));
    (hash >> 40) as u32 % 50
}

struct Request {
    arrives: usize,
    prompt: Vec<u32>,
    tokens_max: usize,
    /// After this many tokens the client leaves.
    leaves_after: Option<usize>,
}

struct World {
    limits: Limits,
    scheduler: Scheduler,
    /// What stands in each slot of the pretend cache.
    cache: Vec<Option<u32>>,
    requests: Vec<Request>,
    answers: HashMap<SeqId, Vec<u32>>,
    preempted: usize,
    cached: usize,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let limits = Limits { batch_size_max: rng.random_range(1..24), batch_tokens_max: rng.random_range(1..96) };
        let (prompt_max, tokens_max) = (rng.random_range(2..120), rng.random_range(1..60));
        // at least one sequence of full length must fit
        let blocks = (prompt_max + tokens_max) / BLOCK_TOKENS + 1 + rng.random_range(0..24);
        let shared: Vec<u32> = (0..prompt_max as u32).map(|_| rng.random_range(0..50)).collect();
        let mut arrives = 0;
        let requests = (0..REQUESTS_A_WORLD).map(|_| {
            arrives += rng.random_range(0..6);
            let len = rng.random_range(1..=prompt_max);
            // many prompts begin alike, so the prefix cache is used
            let alike = rng.random_range(0..=len);
            let prompt = (0..len).map(|i| if i < alike { shared[i] } else { rng.random_range(0..50) }).collect();
            let leaves_after = rng.random_bool(0.2).then(|| rng.random_range(0..tokens_max + 1));
            Request { arrives, prompt, tokens_max: rng.random_range(1..=tokens_max), leaves_after }
        });
        let requests: Vec<Request> = requests.collect();
        Self {
            scheduler: Scheduler::new(limits, blocks),
            cache: vec![None; blocks * BLOCK_TOKENS],
            answers: HashMap::new(),
            preempted: 0,
            cached: 0,
            limits,
            requests,
        }
    }

    /// Runs to the end; gives how often a sequence was preempted, and how many tokens came from the prefix cache.
    fn run(mut self) -> (usize, usize) {
        let mut open: HashSet<SeqId> = HashSet::new();
        let mut arrived = 0;
        for step in 0..STEPS_MAX {
            while arrived < self.requests.len() && self.requests[arrived].arrives <= step {
                let id = SeqId(arrived as u64);
                self.scheduler.add(id, self.requests[arrived].prompt.clone(), Terms::default());
                self.answers.insert(id, Vec::new());
                open.insert(id);
                arrived += 1;
            }
            self.let_some_leave(&mut open);
            let plan = self.scheduler.plan();
            self.check_plan(&plan);
            assert!(
                !plan.pieces.is_empty() || self.scheduler.running() + self.scheduler.waiting() == 0,
                "there is work, and none of it is planned"
            );
            self.step(&plan, &mut open);
            self.check_books();
            if arrived == self.requests.len() && open.is_empty() {
                return self.finish();
            }
        }
        panic!("{} requests are still open after {STEPS_MAX} steps", open.len());
    }

    fn let_some_leave(&mut self, open: &mut HashSet<SeqId>) {
        let leaving = |id: &&SeqId| {
            let had = self.answers[*id].len();
            self.requests[id.0 as usize].leaves_after.is_some_and(|after| had >= after)
        };
        let mut leaving: Vec<SeqId> = open.iter().filter(leaving).copied().collect();
        leaving.sort_unstable();
        for id in leaving {
            let before = self.scheduler.kv().available();
            assert!(self.scheduler.remove(id), "an open sequence is known");
            assert!(self.scheduler.kv().available() >= before, "leaving frees blocks at once");
            open.remove(&id);
        }
    }

    /// Within the bounds, each sequence once, and no block written that another sequence uses.
    fn check_plan(&mut self, plan: &Plan) {
        self.preempted += plan.preempted.len();
        self.cached += plan.tokens_cached;
        assert!(plan.tokens() <= self.limits.batch_tokens_max);
        assert!(
            plan.pieces.len() <= self.limits.batch_size_max && self.scheduler.running() <= self.limits.batch_size_max
        );
        let unique: HashSet<SeqId> = plan.pieces.iter().map(|p| p.seq).collect();
        assert_eq!(unique.len(), plan.pieces.len());
        for piece in &plan.pieces {
            let blocks = self.scheduler.sequence(piece.seq).expect("a planned sequence runs").blocks();
            for position in piece.start..piece.start + piece.len {
                assert_eq!(
                    self.scheduler.kv().references(blocks[position / BLOCK_TOKENS]),
                    1,
                    "a shared block would be written"
                );
            }
        }
    }

    /// Writes the plan's tokens to the pretend cache, and reads whole sequences back through their block tables.
    fn step(&mut self, plan: &Plan, open: &mut HashSet<SeqId>) {
        let slot = |s: &Scheduler, id: SeqId, position: usize| {
            let block = s.sequence(id).expect("a planned sequence runs").blocks()[position / BLOCK_TOKENS];
            block.0 as usize * BLOCK_TOKENS + position % BLOCK_TOKENS
        };
        for piece in &plan.pieces {
            for position in piece.start..piece.start + piece.len {
                let token = self.scheduler.sequence(piece.seq).expect("a planned sequence runs").tokens()[position];
                self.cache[slot(&self.scheduler, piece.seq, position)] = Some(token);
            }
        }
        let sampled: Vec<(SeqId, u32)> = plan
            .pieces
            .iter()
            .filter(|p| p.samples)
            .map(|p| {
                let seen = (0..p.start + p.len).map(|position| {
                    self.cache[slot(&self.scheduler, p.seq, position)].expect("what is read was written")
                });
                (p.seq, next_token(&seen.collect::<Vec<u32>>()))
            })
            .collect();
        self.scheduler.advance(plan);
        for (id, token) in sampled {
            let answer = self.answers.get_mut(&id).expect("a sampled sequence is known");
            answer.push(token);
            if answer.len() == self.requests[id.0 as usize].tokens_max {
                self.scheduler.remove(id);
                open.remove(&id);
            } else {
                self.scheduler.push(id, token);
            }
        }
    }

    fn check_books(&self) {
        let kv = self.scheduler.kv();
        let Counts { free, referenced, cached } = kv.counts();
        assert_eq!(free + referenced + cached, kv.len(), "free + referenced + cached = all");
    }

    /// Every answer is the one computed alone, and every block came back.
    fn finish(self) -> (usize, usize) {
        for (id, answer) in &self.answers {
            let request = &self.requests[id.0 as usize];
            let mut tokens = request.prompt.clone();
            for token in answer {
                assert_eq!(*token, next_token(&tokens), "request {} got another answer in company", id.0);
                tokens.push(*token);
            }
            assert!(
                request.leaves_after.is_some() || answer.len() == request.tokens_max,
                "request {} has no whole answer",
                id.0
            );
        }
        assert_eq!(self.scheduler.kv().counts().referenced, 0, "every block came back");
        (self.preempted, self.cached)
    }
}
