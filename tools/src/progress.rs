//! A bar for what takes long, on stderr, where somebody sees it: a terminal, and no script that wants JSON.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::output::Out;

/// Cells of a bar.
const WIDTH: u64 = 30;
/// Between two pictures.
const PAUSE: Duration = Duration::from_millis(100);

/// See the module.
pub(crate) struct Bar {
    what: String,
    seen: bool,
    drawn: Option<Instant>,
}

impl Bar {
    pub(crate) fn new(what: &str, out: Out) -> Self {
        Bar::on(what, out, std::io::stderr().is_terminal())
    }

    fn on(what: &str, out: Out, terminal: bool) -> Self {
        Bar {
            what: what.to_owned(),
            seen: !out.json && terminal,
            drawn: None,
        }
    }

    /// Whether a picture is due: whoever asks first need not count.
    pub(crate) fn due(&self, now: Instant) -> bool {
        self.seen && self.drawn.is_none_or(|drawn| now.duration_since(drawn) >= PAUSE)
    }

    /// So much is done.
    pub(crate) fn show(&mut self, done: u64, total: u64) {
        let now = Instant::now();
        if self.due(now) {
            self.drawn = Some(now);
            let mut to = std::io::stderr().lock();
            // A terminal that has gone is no reason to stop working.
            write!(to, "\r{}", picture(&self.what, done, total)).ok();
            to.flush().ok();
        }
    }

    /// It is over, and the line is free again.
    pub(crate) fn end(self) {
        if self.drawn.is_some() {
            eprint!("\r\x1b[K");
        }
    }
}

fn picture(what: &str, done: u64, total: u64) -> String {
    let part = |of: u64| (u128::from(done.min(total)) * u128::from(of) / u128::from(total.max(1))) as u64;
    let full = part(WIDTH) as usize;
    let (full, empty) = ("#".repeat(full), "-".repeat(WIDTH as usize - full));
    format!("{what} [{full}{empty}] {:3} %", part(100))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_shows_how_much_is_done() {
        assert_eq!(picture("x", 0, 10), format!("x [{}]   0 %", "-".repeat(30)));
        assert_eq!(
            picture("x", 5, 10),
            format!("x [{}{}]  50 %", "#".repeat(15), "-".repeat(15))
        );
        assert_eq!(picture("x", 10, 10), format!("x [{}] 100 %", "#".repeat(30)));
        assert_eq!(picture("x", 11, 10), picture("x", 10, 10));
        assert_eq!(
            picture("x", 0, 0),
            picture("x", 0, 10),
            "nothing to do is no error"
        );
        assert!(picture("x", u64::MAX, u64::MAX).ends_with("100 %"));
    }

    #[test]
    fn a_bar_is_for_a_person_at_a_terminal_and_no_script_sees_it() {
        let due = |json, terminal| Bar::on("x", Out { json }, terminal).due(Instant::now());
        assert!(due(false, true));
        assert!(!due(true, true), "whoever asks for JSON");
        assert!(!due(false, false), "whoever reads a pipe");
    }
}
