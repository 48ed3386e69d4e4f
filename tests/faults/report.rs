//! The figures of a run, one row for each thing that was done to the cluster.

use std::{fmt::Write, time::Duration};

use super::work::{Taken, Verdict};

/// All rows.
#[derive(Default)]
pub(crate) struct Report {
    rows: Vec<Row>,
    /// What was wrong, each with its row.
    wrong: Vec<String>,
}

struct Row {
    what: String,
    answers: usize,
    failed: usize,
    differ: usize,
    moved: usize,
    /// Of streams that changed their node, and of the others.
    pauses: [Pauses; 2],
}

/// The longest pause in each of some streams, the shortest first.
struct Pauses(Vec<Duration>);

impl Pauses {
    fn of(taken: &[Taken], moved: bool) -> Self {
        let mut all: Vec<Duration> = taken.iter().filter(|t| t.moved == moved).filter_map(|t| t.pause).collect();
        all.sort_unstable();
        Self(all)
    }

    /// Median and worst, in seconds.
    fn row(&self) -> String {
        let second = |pause: Option<&Duration>| pause.map_or("-".into(), |p| format!("{:.2}", p.as_secs_f64()));
        format!("{:>6} / {:<6}", second(self.0.get(self.0.len() / 2)), second(self.0.last()))
    }
}

impl Report {
    /// Adds a row, and shows it.
    pub(crate) fn note(&mut self, what: impl Into<String>, taken: Vec<Taken>) {
        let what = what.into();
        let count = |is: fn(&Taken) -> bool| taken.iter().filter(|t| is(t)).count();
        let row = Row {
            answers: taken.len(),
            failed: count(|t| matches!(t.verdict, Verdict::Failed(_))),
            differ: count(|t| matches!(t.verdict, Verdict::Differs(_))),
            moved: count(|t| t.moved),
            pauses: [true, false].map(|moved| Pauses::of(&taken, moved)),
            what,
        };
        for Taken { verdict, .. } in &taken {
            if let Verdict::Failed(why) | Verdict::Differs(why) = verdict {
                self.wrong.push(format!("{}: {why}", row.what));
            }
        }
        self.rows.push(row);
    }

    /// Shows all rows.
    ///
    /// # Panics
    /// When an answer failed or differs, or nothing was ever moved.
    pub(crate) fn judge(&self) {
        println!("{}", self.table());
        assert!(self.wrong.is_empty(), "{} answers are wrong:\n{}", self.wrong.len(), self.wrong.join("\n"));
        assert!(self.rows.iter().any(|row| row.moved > 0), "nothing was on a node when it was lost");
    }

    fn table(&self) -> String {
        let mut out = format!(
            "{:<48} {:>7} {:>6} {:>6} {:>6}  {:<17} {:<17}\n",
            "what was done", "answers", "errors", "differ", "moved", "pause of moved, s", "of the others, s"
        );
        for Row { what, answers, failed, differ, moved, pauses } in &self.rows {
            let [of_moved, of_others] = pauses.each_ref().map(Pauses::row);
            let _ = writeln!(
                out,
                "{what:<48} {answers:>7} {failed:>6} {differ:>6} {moved:>6}  {of_moved:<17} {of_others:<17}"
            );
        }
        out.push_str("pauses: in each stream the longest time between two events; median / worst of them\n");
        out
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        if std::thread::panicking() && !self.rows.is_empty() {
            println!("{}{}", self.table(), self.wrong.join("\n"));
        }
    }
}
