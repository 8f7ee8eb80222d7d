//! Several templates in one call, as a graph: which image starts from which,
//! and when each is baked. Decides only; starts nothing.

use kiln_model::reference::{Pointer, Reference};
use kiln_model::{Code, Error, Result};

use crate::template::Template;

/// One image to bake.
#[derive(Debug, Clone)]
pub struct Node {
    /// Image name.
    pub name: String,
    /// Image version.
    pub version: String,
    /// The image that it starts from, if it does.
    pub base: Option<Reference>,
    /// Bytes of this machine's memory that its guest takes.
    pub memory: u64,
}

impl Node {
    /// What bakes `template`.
    pub fn of(template: &Template) -> Self {
        Self {
            name: template.name.clone(),
            version: template.version.clone(),
            base: template.base.image().cloned(),
            memory: template.builder.memory(),
        }
    }

    /// `name:version`.
    pub fn title(&self) -> String {
        format!("{}:{}", self.name, self.version)
    }
}

/// What this machine carries at a time. One bake always runs.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How many bakes.
    pub bakes: usize,
    /// Bytes of memory of all their guests.
    pub memory: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting,
    Runs,
    Baked,
    /// It failed, or never ran.
    Lost,
}

/// The images of one call, and how far each is.
#[derive(Debug)]
pub struct Graph {
    nodes: Vec<Node>,
    /// For each, which of the others it starts from.
    bases: Vec<Option<usize>>,
    states: Vec<State>,
    limits: Limits,
}

impl Graph {
    /// # Errors
    /// [`Code::Usage`] when two make the same image, when a base may be either
    /// of two, or when some start from each other in a circle.
    pub fn new(nodes: Vec<Node>, limits: Limits) -> Result<Self> {
        for (index, node) in nodes.iter().enumerate() {
            if nodes.iter().take(index).any(|other| other.title() == node.title()) {
                let error = Error::new(Code::Usage, format!("two of the templates make {}", node.title()));
                return Err(error.next("name each template once, and give each image a name or version of its own"));
            }
        }
        let bases = (0..nodes.len()).map(|index| base_among(&nodes, index)).collect::<Result<Vec<_>>>()?;
        if let Some(circle) = circle(&bases) {
            let titles: Vec<String> = circle.iter().filter_map(|index| nodes.get(*index)).map(Node::title).collect();
            let error = Error::new(Code::Usage, format!("these images start from each other: {}", titles.join(" from ")));
            return Err(error.next("let one of them start from something else"));
        }
        let states = vec![State::Waiting; nodes.len()];
        Ok(Self { nodes, bases, states, limits })
    }

    /// Which of the others this one starts from.
    pub fn base(&self, index: usize) -> Option<usize> {
        self.bases.get(index).copied().flatten()
    }

    /// Those that begin now, in the order in which they were named.
    pub fn begin(&mut self) -> Vec<usize> {
        let mut begun = Vec::new();
        for index in 0..self.nodes.len() {
            if self.may_begin(index) {
                self.set(index, State::Runs);
                begun.push(index);
            }
        }
        begun
    }

    /// One has ended. Gives those that will never run because of that.
    pub fn ended(&mut self, index: usize, baked: bool) -> Vec<usize> {
        self.set(index, if baked { State::Baked } else { State::Lost });
        let mut lost = Vec::new();
        loop {
            let starts_from_lost = |waiting: &usize| self.base(*waiting).is_some_and(|base| self.is(base, State::Lost));
            let next = self.waiting().into_iter().find(starts_from_lost);
            let Some(next) = next else { return lost };
            self.set(next, State::Lost);
            lost.push(next);
        }
    }

    /// Nothing begins any more. Gives those that now never run.
    pub fn stop(&mut self) -> Vec<usize> {
        let waiting = self.waiting();
        for index in &waiting {
            self.set(*index, State::Lost);
        }
        waiting
    }

    fn may_begin(&self, index: usize) -> bool {
        if !self.is(index, State::Waiting) || self.base(index).is_some_and(|base| !self.is(base, State::Baked)) {
            return false;
        }
        let memory = |index: usize| self.nodes.get(index).map_or(0, |node| node.memory);
        let running: Vec<usize> = (0..self.nodes.len()).filter(|index| self.is(*index, State::Runs)).collect();
        let taken: u64 = running.iter().map(|index| memory(*index)).fold(memory(index), u64::saturating_add);
        running.is_empty() || (running.len() < self.limits.bakes && taken <= self.limits.memory)
    }

    fn waiting(&self) -> Vec<usize> {
        (0..self.nodes.len()).filter(|index| self.is(*index, State::Waiting)).collect()
    }

    fn is(&self, index: usize, state: State) -> bool {
        self.states.get(index) == Some(&state)
    }

    fn set(&mut self, index: usize, state: State) {
        if let Some(slot) = self.states.get_mut(index) {
            *slot = state;
        }
    }
}

/// Which of the other nodes makes the image that a node starts from.
fn base_among(nodes: &[Node], index: usize) -> Result<Option<usize>> {
    let Some(node) = nodes.get(index) else { return Ok(None) };
    let Some(Reference { registry: None, name, pointer: Pointer::Tag(version) }) = &node.base else { return Ok(None) };
    // An image that starts from its own name starts from what the store has of it.
    let others = nodes.iter().enumerate().filter(|(other, _)| *other != index);
    let makes = |other: &Node| other.name == *name && version.as_ref().is_none_or(|version| other.version == *version);
    let found: Vec<(usize, &Node)> = others.filter(|(_, other)| makes(other)).collect();
    match found.as_slice() {
        [] => Ok(None),
        [(base, _)] => Ok(Some(*base)),
        several => {
            let titles: Vec<String> = several.iter().map(|(_, other)| other.title()).collect();
            let error = Error::new(Code::Usage, format!("{} starts from `{name}`, which may be {}", node.title(), titles.join(" or ")));
            Err(error.next(format!("write `image = \"{name}:VERSION\"`")))
        }
    }
}

/// A circle, if there is one: each starts from the next, and the last one is
/// the first again.
fn circle(bases: &[Option<usize>]) -> Option<Vec<usize>> {
    (0..bases.len()).find_map(|first| {
        let mut path = vec![first];
        // Whoever goes further than there are nodes goes round a circle that
        // `first` is not part of; another start finds it.
        while path.len() <= bases.len() {
            let next = path.last().and_then(|last| bases.get(*last).copied().flatten())?;
            path.push(next);
            if next == first {
                return Some(path);
            }
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANY: Limits = Limits { bakes: 9, memory: u64::MAX };

    /// Nodes of 10 bytes, each a title and what it starts from.
    fn graph(nodes: &[(&str, &str)], limits: Limits) -> Result<Graph> {
        let node = |(title, base): &(&str, &str)| {
            let (name, version) = title.split_once(':').unwrap();
            let base = (!base.is_empty()).then(|| base.parse().unwrap());
            Node { name: name.into(), version: version.into(), base, memory: 10 }
        };
        Graph::new(nodes.iter().map(node).collect(), limits)
    }

    #[track_caller]
    fn refused(nodes: &[(&str, &str)], said: &str) {
        let error = graph(nodes, MANY).unwrap_err();
        assert_eq!((error.kind(), error.chain().contains(said)), (Code::Usage, true), "{}", error.chain());
    }

    #[test]
    fn each_waits_for_the_image_it_starts_from() {
        let mut graph = graph(&[("c:1", "b"), ("b:1", "a:1"), ("a:1", ""), ("d:1", "elsewhere")], MANY).unwrap();
        assert_eq!((graph.base(0), graph.base(1), graph.base(3)), (Some(1), Some(2), None));
        assert_eq!(graph.begin(), [2, 3]);
        assert!(graph.begin().is_empty());
        assert!(graph.ended(2, true).is_empty());
        assert_eq!(graph.begin(), [1]);
        graph.ended(3, true);
        assert!(graph.begin().is_empty());
        graph.ended(1, true);
        assert_eq!(graph.begin(), [0]);
    }

    #[test]
    fn what_names_no_other_template_is_looked_for_in_the_store() {
        let digest = format!("a@{}", kiln_model::Digest::of("a"));
        for base in ["a:2", "registry.example/a:1", "a@production", &digest, "b", "b:1"] {
            assert_eq!(graph(&[("a:1", ""), ("b:1", base)], MANY).unwrap().base(1), None, "{base}");
        }
        assert_eq!(graph(&[("a:1", ""), ("a:2", "a")], MANY).unwrap().base(1), Some(0));
    }

    #[test]
    fn what_is_wrong_is_said_before_anything_runs() {
        refused(&[("a:1", ""), ("b:1", ""), ("a:1", "b")], "two of the templates make a:1");
        refused(&[("a:1", ""), ("a:2", ""), ("b:1", "a")], "b:1 starts from `a`, which may be a:1 or a:2");
        refused(&[("a:1", "b"), ("b:1", "a:1")], "each other: a:1 from b:1 from a:1");
        refused(&[("x:1", "a"), ("a:1", "b"), ("b:1", "c"), ("c:1", "a")], "each other: a:1 from b:1 from c:1 from a:1");
    }

    #[test]
    fn no_more_at_a_time_than_the_machine_carries_but_always_one() {
        let free = [("a:1", ""), ("b:1", ""), ("c:1", "")];
        for (bakes, memory, first) in [(2, 100, 2), (9, 20, 2), (9, 29, 2), (9, 30, 3), (9, 5, 1), (0, 0, 1)] {
            let mut graph = graph(&free, Limits { bakes, memory }).unwrap();
            assert_eq!(graph.begin().len(), first, "{bakes} {memory}");
            graph.ended(0, true);
            let more = graph.begin().len();
            assert_eq!(more, usize::from(first < 3), "{bakes} {memory}");
        }
    }

    #[test]
    fn a_small_one_goes_before_a_large_one_that_has_no_room() {
        let mut nodes: Vec<Node> = Vec::new();
        for (name, memory) in [("a", 60), ("large", 90), ("small", 30)] {
            nodes.push(Node { name: name.into(), version: "1".into(), base: None, memory });
        }
        let mut graph = Graph::new(nodes, Limits { bakes: 9, memory: 100 }).unwrap();
        assert_eq!(graph.begin(), [0, 2]);
        graph.ended(0, true);
        assert!(graph.begin().is_empty());
        graph.ended(2, true);
        assert_eq!(graph.begin(), [1]);
    }

    #[test]
    fn what_starts_from_a_failed_one_never_runs_and_the_rest_does() {
        let mut graph = graph(&[("a:1", ""), ("b:1", "a"), ("c:1", "b"), ("d:1", ""), ("e:1", "d")], MANY).unwrap();
        assert_eq!(graph.begin(), [0, 3]);
        assert_eq!(graph.ended(0, false), [1, 2]);
        assert!(graph.begin().is_empty());
        graph.ended(3, true);
        assert_eq!(graph.begin(), [4]);
        assert!(graph.stop().is_empty());
    }

    #[test]
    fn nothing_begins_after_a_stop() {
        let mut graph = graph(&[("a:1", ""), ("b:1", "a"), ("c:1", "")], Limits { bakes: 1, memory: 0 }).unwrap();
        assert_eq!(graph.begin(), [0]);
        assert_eq!(graph.stop(), [1, 2]);
        assert!(graph.ended(0, true).is_empty() && graph.begin().is_empty());
    }
}
