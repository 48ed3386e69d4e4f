//! Goal: what a tenant gets beside others that want more than there is. Method: the scheduler alone, with sequences whose answers are as
//! long as they say; time is the number of tokens computed, which is what a step costs.

use std::collections::HashMap;

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tidegate_node::sched::{Class, Limits, Owner, Plan, Scheduler, SeqId, Terms};

/// A scheduler, and how many tokens each of its sequences still generates.
struct Engine {
    scheduler: Scheduler,
    left: HashMap<SeqId, (Owner, usize)>,
    next: u64,
    rng: StdRng,
    /// Tokens computed.
    time: usize,
    had: HashMap<Owner, usize>,
}

impl Engine {
    fn new(seed: u64, limits: Limits, blocks: usize) -> Self {
        let (left, had, rng) = (HashMap::new(), HashMap::new(), StdRng::seed_from_u64(seed));
        Self { scheduler: Scheduler::new(limits, blocks), left, next: 0, rng, time: 0, had }
    }

    fn add(&mut self, owner: &Owner, prompt: usize, answer: usize) -> SeqId {
        let id = SeqId(self.next);
        self.next += 1;
        let prompt = (0..prompt).map(|_| self.rng.random_range(0..1000)).collect();
        self.scheduler.add(id, prompt, Terms::default(), owner.clone());
        self.left.insert(id, (owner.clone(), answer));
        id
    }

    fn open(&self, owner: &Owner) -> usize {
        self.left.values().filter(|(of, _)| of == owner).count()
    }

    /// One step; gives who got a token.
    fn step(&mut self) -> Vec<SeqId> {
        let plan: Plan = self.scheduler.plan();
        self.time += plan.tokens();
        self.scheduler.advance(&plan);
        for piece in &plan.pieces {
            *self.had.entry(self.left[&piece.seq].0.clone()).or_default() += piece.len;
        }
        let sampled: Vec<SeqId> = plan.pieces.iter().filter(|p| p.samples).map(|p| p.seq).collect();
        for id in &sampled {
            let (_, left) = self.left.get_mut(id).expect("a planned sequence is open");
            *left -= 1;
            if *left == 0 {
                self.left.remove(id);
                self.scheduler.remove(*id);
            } else {
                self.scheduler.push(*id, 7);
            }
        }
        sampled
    }
}

fn owner(tenant: &str, class: Class) -> Owner {
    Owner { tenant: tenant.into(), class }
}

/// One tenant always has as much waiting as it may; another asks now and then. Its prompt is several steps long, and it comes at the
/// worst moment, when a step has just begun.
#[test]
fn a_flood_does_not_double_another_tenants_time_to_the_first_token() {
    const PROMPT: usize = 400;
    let slowest = super::in_every_world(200, |seed| {
        let mut rng = StdRng::seed_from_u64(!seed);
        let limits = Limits { batch_size_max: rng.random_range(2..33), batch_tokens_max: 128 };
        let blocks = rng.random_range(200..1500);
        let (flood, calm) = (owner("flood", Class::Normal), owner("calm", Class::Normal));

        let mut idle = Engine::new(seed, limits, blocks);
        let id = idle.add(&calm, PROMPT, 1);
        while !idle.step().contains(&id) {}

        let mut engine = Engine::new(seed, limits, blocks);
        let mut worst = 0;
        for _ in 0..12 {
            let steps = rng.random_range(10..80);
            for _ in 0..steps {
                refill(&mut engine, &flood, &mut rng);
                engine.step();
            }
            let came = engine.time;
            // the step that was under way
            refill(&mut engine, &flood, &mut rng);
            engine.step();
            let id = engine.add(&calm, PROMPT, 1);
            while !engine.step().contains(&id) {
                refill(&mut engine, &flood, &mut rng);
            }
            worst = worst.max(engine.time - came);
        }
        let ratio = worst as f64 / idle.time as f64;
        assert!(
            ratio <= 2.0,
            "{worst} tokens until the first one, {} when idle: {ratio:.2} times ({limits:?})",
            idle.time
        );
        ratio
    });
    let worst = slowest.iter().copied().fold(0.0, f64::max);
    let mean = slowest.iter().sum::<f64>() / slowest.len() as f64;
    println!(
        "time to the first token beside a flood: at worst {worst:.2} times the idle one, {mean:.2} in the mean world"
    );
}

fn refill(engine: &mut Engine, flood: &Owner, rng: &mut StdRng) {
    while engine.open(flood) < 80 {
        engine.add(flood, rng.random_range(1..800), rng.random_range(1..400));
    }
}

/// Tenants that always have something waiting, of different habits, get tokens by the weight of their classes, whatever a request of
/// theirs is like.
#[test]
fn tokens_are_shared_by_weight_and_not_by_requests() {
    super::in_every_world(60, |seed| {
        let mut rng = StdRng::seed_from_u64(seed);
        let limits = Limits { batch_size_max: 24, batch_tokens_max: 96 };
        let mut engine = Engine::new(seed, limits, 2000);
        let tenants: Vec<(Owner, usize)> = (0..rng.random_range(2..5))
            .map(|i| {
                let class = if seed % 2 == 0 { Class::Normal } else { Class::ALL[i % 3] };
                // some ask for much at a time, some for little
                (owner(&format!("tenant {i}"), class), [150, 900][rng.random_range(0..2)])
            })
            .collect();
        for _ in 0..3000 {
            for (owner, prompt) in &tenants {
                while engine.open(owner) < 30 {
                    engine.add(owner, rng.random_range(prompt / 2..*prompt), 1);
                }
            }
            engine.step();
        }
        let weights: u64 = tenants.iter().map(|(owner, _)| owner.class.weight()).sum();
        for (owner, prompt) in &tenants {
            let part = engine.time as f64 * owner.class.weight() as f64 / weights as f64;
            let had = engine.had[owner] as f64;
            assert!(
                (had - part).abs() <= 0.05 * part,
                "{owner:?} (prompts to {prompt}) had {had}, its part is {part:.0}"
            );
        }
    });
}

/// Requests of a low class come to their ends while a tenant of the high one never stops, and ever new ones come beside it: within the
/// time in which their part of all weights, or half of it, has come to what they need.
#[test]
fn no_class_starves() {
    const NEW_MAX: usize = 12;
    super::in_every_world(100, |seed| {
        let mut rng = StdRng::seed_from_u64(seed);
        let limits = Limits { batch_size_max: rng.random_range(1..9), batch_tokens_max: rng.random_range(16..65) };
        let mut engine = Engine::new(seed, limits, 64);
        let (high, low) = (owner("high", Class::High), owner("low", Class::Low));
        for _ in 0..4 {
            engine.add(&low, 100, 20);
        }
        let weights = Class::High.weight() as usize * (1 + NEW_MAX) + 1;
        let (mut newest, mut new) = (0, Vec::new());
        while engine.open(&low) > 0 {
            new.retain(|owner| engine.open(owner) > 0);
            while new.len() < NEW_MAX {
                newest += 1;
                new.push(owner(&format!("new {newest}"), Class::High));
                engine.add(new.last().expect("it was pushed"), 40, 10);
            }
            while engine.open(&high) < 10 {
                engine.add(&high, rng.random_range(1..200), rng.random_range(1..50));
            }
            engine.step();
            let most = 2 * 4 * 120 * weights;
            assert!(engine.time < most, "{} of the low class wait after {most} tokens", engine.open(&low));
        }
    });
}
