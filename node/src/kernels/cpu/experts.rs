//! Which rows of a step go to which expert.

use super::{Rows, isa::Isa, rowwise};

/// One row's use of one expert.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Route {
    pub(crate) expert: u32,
    pub(crate) row: u32,
    pub(crate) weight: f32,
}

/// All routes of a step, by expert and then by row: so each row's experts add up in the same order whatever rows are beside it.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    /// The router's scores, `[T, N]`; probabilities after [`choose`](Self::choose), with those of the chosen taken out.
    pub(crate) scores: Rows,
    routes: Vec<Route>,
}

impl Routes {
    /// Takes the `used` most probable experts of each row; of equals the first.
    pub(crate) fn choose(&mut self, isa: Isa, used: usize, is_normalized: bool) {
        self.routes.clear();
        for row in 0..self.scores.count() {
            let probabilities = self.scores.row_mut(row);
            rowwise::softmax(isa, probabilities);
            let first = self.routes.len();
            for _ in 0..used {
                let (expert, weight) = top(probabilities);
                probabilities[expert] = f32::NEG_INFINITY;
                self.routes.push(Route { expert: expert as u32, row: row as u32, weight });
            }
            if is_normalized {
                let chosen = &mut self.routes[first..];
                let total: f32 = chosen.iter().map(|r| r.weight).sum();
                chosen.iter_mut().for_each(|r| r.weight /= total);
            }
        }
        self.routes.sort_unstable_by_key(|r| (r.expert, r.row));
    }

    /// The routes of each expert that has any.
    pub(crate) fn by_expert(&self) -> impl Iterator<Item = &[Route]> {
        self.routes.chunk_by(|a, b| a.expert == b.expert)
    }
}

/// Place and value of the greatest; of equals the first.
fn top(values: &[f32]) -> (usize, f32) {
    let start = (0, f32::NEG_INFINITY);
    values.iter().copied().enumerate().fold(start, |best, (i, v)| if v > best.1 { (i, v) } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_takes_its_most_probable_experts_and_ties_go_to_the_first() {
        let mut routes = Routes::default();
        routes.scores.resize(2, 4);
        routes.scores.row_mut(0).copy_from_slice(&[0.0, 3.0, 1.0, 2.0]);
        routes.scores.row_mut(1).copy_from_slice(&[1.0, 1.0, 1.0, 1.0]);
        routes.choose(Isa::Portable, 2, true);
        let found: Vec<Vec<(u32, u32)>> =
            routes.by_expert().map(|group| group.iter().map(|r| (r.expert, r.row)).collect()).collect();
        assert_eq!(found, [vec![(0, 1)], vec![(1, 0), (1, 1)], vec![(3, 0)]]);
        let weight = 1.0 / (1.0 + (-1.0f32).exp());
        let first = routes.by_expert().nth(1).unwrap()[0];
        assert!((first.weight - weight).abs() < 1e-6, "{} is not {weight}", first.weight);
    }
}
