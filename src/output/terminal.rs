//! Bars and spinners, for a terminal.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use kiln_model::event::{Event, Phase};

use super::plain::{ended, failures, title};
use super::{Sink, seconds};

/// Draws events on standard error.
pub(super) struct Terminal {
    bars: MultiProgress,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    phases: HashMap<String, ProgressBar>,
    transfers: HashMap<String, ProgressBar>,
}

impl Terminal {
    pub(super) fn new() -> Self {
        Self { bars: MultiProgress::new(), state: Mutex::default() }
    }

    fn line(&self, text: &str) {
        let _ = self.bars.println(text);
    }

    fn spinner(&self, name: &str) -> ProgressBar {
        let bar = self.bars.add(ProgressBar::new_spinner());
        bar.set_style(style("{spinner:.cyan} {prefix}  {elapsed:.dim}"));
        bar.set_prefix(name.to_owned());
        bar.enable_steady_tick(Duration::from_millis(100));
        bar
    }

    fn transfer(&self, name: &str, total: Option<u64>) -> ProgressBar {
        let bar = self.bars.add(ProgressBar::new(total.unwrap_or(0)));
        bar.set_style(match total {
            Some(_) => style("  {prefix:.dim} {bar:30.cyan/dim} {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {eta:.dim}"),
            None => style("  {prefix:.dim} {binary_bytes}  {binary_bytes_per_sec}"),
        });
        bar.set_prefix(name.to_owned());
        bar
    }
}

fn style(template: &str) -> ProgressStyle {
    // A template is a constant of this file; should one be wrong, the default serves.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}

fn dim(text: &str) -> String {
    console::style(text).dim().for_stderr().to_string()
}

impl Sink for Terminal {
    fn take(&self, image: Option<&str>, event: Event) {
        // Bars are told apart by what stands before them.
        let of = |name: &str| image.map_or_else(|| name.to_owned(), |image| format!("{image} {name}"));
        let show = |text: &str| match image {
            Some(image) => self.line(&format!("{} {text}", dim(image))),
            None => self.line(text),
        };
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match event {
            Event::Started { name, version, bake, .. } => {
                show(&format!("{} {name}:{version} {}", console::style("baking").bold().for_stderr(), dim(&bake)));
            }
            Event::Begin { phase, name } => {
                let name = of(&title(phase, &name));
                let bar = self.spinner(&name);
                state.phases.insert(name, bar);
            }
            Event::Output { name, line, .. } => show(&format!("  {} {}", dim(&format!("{name} │")), console::strip_ansi_codes(&line))),
            Event::Progress { name, done, total } => {
                let name = of(&name);
                let bar = state.transfers.entry(name.clone()).or_insert_with(|| self.transfer(&name, total));
                bar.set_position(done);
                if total.is_some_and(|total| done >= total) {
                    bar.finish_and_clear();
                    state.transfers.remove(&name);
                }
            }
            Event::End { phase, name, cached, age_seconds, seconds: took } => {
                let name = title(phase, &name);
                if let Some(bar) = state.phases.remove(&of(&name)) {
                    bar.finish_and_clear();
                }
                let mark = console::style("✓").green().for_stderr();
                let how = if cached { ended(cached, age_seconds, took) } else { seconds(took) };
                show(&format!("{mark} {name}  {}", dim(&how)));
            }
            Event::Note { message } => show(&dim(&message)),
            Event::Warning { message } => show(&format!("{} {message}", console::style("warning:").yellow().bold().for_stderr())),
            Event::Baked(image) => show(&format!(
                "{} {}:{} {} {}",
                console::style("baked").green().bold().for_stderr(),
                image.name,
                image.version,
                image.digest,
                dim(&format!("in {}", seconds(image.seconds)))
            )),
            Event::Tested(test) => {
                if let Some(bar) = state.phases.remove(&of(&title(Phase::Test, &test.name))) {
                    bar.finish_and_clear();
                }
                failures(&test).iter().for_each(|line| show(&console::style(line).red().for_stderr().to_string()));
            }
            Event::Failed { .. } => {}
            Event::Done { .. } => {
                for (_, bar) in state.phases.drain() {
                    bar.finish_and_clear();
                }
                for (_, bar) in state.transfers.drain() {
                    bar.finish_and_clear();
                }
            }
        }
    }

    fn forget(&self, image: &str) {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let State { phases, transfers } = &mut *state;
        for bars in [phases, transfers] {
            for (_, bar) in bars.extract_if(|name, _| name.split_once(' ').is_some_and(|(of, _)| of == image)) {
                bar.finish_and_clear();
            }
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.bars.clear();
    }
}
