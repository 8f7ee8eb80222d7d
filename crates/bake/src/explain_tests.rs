use std::time::Duration;

use kiln_model::Digest;

use super::{Changes, Explanation, Origin, limit_span, reasons, span};
use crate::resume::Options;
use crate::testing::{DAY, World, steps, web};

fn abc() -> String {
    steps(&[("a", "1"), ("b", "2"), ("c", "3")])
}

/// What a bake says.
fn said(world: &World, rest: &str) -> Vec<String> {
    reasons(&world.explain(&web(rest), &Options::default()))
}

fn with(world: &World, options: &Options) -> Vec<String> {
    reasons(&world.explain(&web(&abc()), options))
}

/// A world in which `abc` was baked two minutes ago.
fn baked() -> World {
    let mut world = World::default();
    world.bake(&web(&abc()), Duration::from_secs(120));
    world
}

#[test]
fn what_has_changed_is_named_with_the_bake_it_changed_since() {
    let world = baked();
    let since = "since bake 01J0 (2 min ago)";
    let cases: Vec<(String, Vec<String>)> = vec![
        (abc(), vec![]),
        // The parts of the fake shell have one name.
        (abc().replace('3', "x"), vec![format!("step 3 `c`: `settings` changed {since}")]),
        (abc().replace('2', "x"), vec![format!("step 2 `b`: `settings` changed {since}"), "step 3 `c`: after step 2, which runs".into()]),
        (
            abc().replace('2', "x").replace('3', "y"),
            vec![format!("step 2 `b`: `settings` changed {since}"), format!("step 3 `c`: `settings` changed {since}")],
        ),
        (abc() + "env = { GREETING = 'x' }\n", vec![format!("step 3 `c`: `env GREETING` was added {since}")]),
        (abc() + "user = 'x'\nenv = { A = '' }\n", vec![format!("step 3 `c`: `user` changed, `env A` was added {since}")]),
        (abc() + &steps(&[("d", "4")]), vec![format!("step 4 `d`: it is new {since}")]),
        // A default name that moves on is not taken for a change.
        (
            format!("[[provision]]\nshell = '0'\n{}", abc()),
            vec![
                format!("step 1 `shell-1`: it is new {since}"),
                "step 2 `a`: after step 1, which runs".into(),
                "step 3 `b`: after step 1, which runs".into(),
                "step 4 `c`: after step 1, which runs".into(),
            ],
        ),
        (
            steps(&[("a", "1"), ("c", "3"), ("b", "2")]),
            vec![format!("step 2 `c`: the order changed (it was step 3) {since}"), "step 3 `b`: after step 2, which runs".into()],
        ),
        (steps(&[("a", "1"), ("c", "3")]), vec![format!("step 2 `c`: `b`, before it, was removed {since}")]),
        (steps(&[("c", "3")]), vec![format!("step 1 `c`: `a` and `b`, before it, were removed {since}")]),
        (steps(&[("a", "1"), ("b", "2")]), vec!["seal: these steps were never sealed".into()]),
        // A new name of a step alone changes no disk.
        (abc().replace("'b'", "'new'"), vec![format!("seal: the disk is the same, and labels or names of steps changed {since}")]),
        (abc() + "[seal]\nkeep = ['/x']\n", vec![format!("seal: `keep /x` was added {since}")]),
        (
            format!("[disk]\nsize = '9GiB'\n{}", abc()),
            vec![
                format!("step 1 `a`: `[disk] size` changed {since}"),
                "step 2 `b`: after step 1, which runs".into(),
                "step 3 `c`: after step 1, which runs".into(),
            ],
        ),
        (
            "[[provision]]\nname = 'a'\nfile = { source = 'kiln.toml', destination = '/a' }\n".into(),
            vec![format!("step 1 `a`: it changed from `shell` to `file` {since}")],
        ),
    ];
    for (rest, expected) in cases {
        assert_eq!(said(&world, &rest), expected, "{rest}");
    }
    // A new version runs the seal alone.
    let explanation = world.explain(&web(&abc()).replace("version = '1'", "version = '2'"), &Options::default());
    assert_eq!(reasons(&explanation), [format!("seal: `version` changed {since}")]);
    assert!(explanation.steps.iter().all(|step| step.line.cached));
}

#[test]
fn another_base() {
    let mut world = baked();
    let since = "since bake 01J0 (2 min ago)";
    let after = |step: &str| format!("{step}: after step 1, which runs");
    world.base = Some(Digest::of("rebuilt"));
    assert_eq!(said(&world, &abc())[0], format!("step 1 `a`: the base changed {since}"));
    assert_eq!(said(&world, &abc().replace('1', "x"))[0], format!("step 1 `a`: the base changed; `settings` changed {since}"));
    assert_eq!(said(&world, &abc())[1..], [after("step 2 `b`"), after("step 3 `c`")]);
    assert_eq!(said(&world, ""), [format!("seal: the base changed {since}")]);
    let other = web(&abc()).replace("debian = 'x'", "debian = 'y'");
    let explanation = world.explain(&other, &Options::default());
    assert_eq!(reasons(&explanation)[0], format!("step 1 `a`: the base changed from debian x to debian y {since}"));
    world.base = None;
    let first = "the base is fetched first";
    assert_eq!(
        said(&world, &abc().replace('2', "x")),
        [format!("step 1 `a`: {first}"), format!("step 2 `b`: `settings` changed {since}"), format!("step 3 `c`: {first}")]
    );
}

#[test]
fn the_nearest_bake_is_the_one_to_compare_with() {
    let mut world = baked();
    world.bake(&web(&abc().replace('1', "branch")), Duration::from_secs(60));
    assert_eq!(said(&world, &abc().replace('3', "x")), ["step 3 `c`: `settings` changed since bake 01J0 (2 min ago)"]);
    assert_eq!(
        said(&world, &abc().replace('1', "branch").replace('3', "x")),
        ["step 3 `c`: `settings` changed since bake 01J1 (1 min ago)"]
    );
}

#[test]
fn what_runs_although_nothing_has_changed() {
    let none = |step: &str, why: &str| format!("{step}: {why}");
    let world = World::default();
    assert_eq!(said(&world, &abc())[1], "step 2 `b`: no bake of `web` is known");

    let world = baked();
    let no_cache = with(&world, &Options { no_cache: true, ..Options::default() });
    assert_eq!(no_cache[2], "step 3 `c`: --no-cache");
    assert_eq!(with(&world, &Options { fresh: true, ..Options::default() })[0], "step 1 `a`: --fresh");
    assert_eq!(
        with(&world, &Options { from: Some("b".into()), ..Options::default() }),
        ["step 2 `b`: --from names it", "step 3 `c`: after step 2, which runs"]
    );
    let never = abc().replace("name = 'b'\n", "name = 'b'\ncache = false\n");
    assert_eq!(said(&world, &never), ["step 2 `b`: `cache = false`", "step 3 `c`: after step 2, which runs"]);

    // Age: of the step itself, or of one before it.
    let mut world = World::default();
    world.bake(&web(&abc()), DAY * 8);
    assert_eq!(
        said(&world, &abc())[..2],
        [none("step 1 `a`", "ran 8 d ago, and max_age is 7 d"), none("step 2 `b`", "after step 1, which runs")]
    );
    let own = abc().replace("name = 'a'\n", "name = 'a'\ncache = 'forever'\n").replace("name = 'b'\n", "name = 'b'\ncache = '8h'\n");
    assert_eq!(said(&world, &own), ["step 2 `b`: ran 8 d ago, and its `cache` is 8 h", "step 3 `c`: after step 2, which runs"]);
    let mut world = World::default();
    world.bake(&web(&abc()), DAY * 7 + Duration::from_secs(9));
    assert_eq!(said(&world, &abc())[0], "step 1 `a`: ran more than 7 d ago, and max_age is 7 d");

    // Nothing is kept after it.
    let mut world = baked();
    world.drop_images();
    world.drop_checkpoint(2);
    assert_eq!(said(&world, &abc()), ["step 3 `c`: no checkpoint is kept after it: there was no room, or it was pruned"]);
    let off = abc() + "checkpoint = false\n";
    assert_eq!(said(&world, &off), ["step 3 `c`: no checkpoint is kept after it: `checkpoint = false`"]);
    world.records[0].steps[2].seconds = 0.2;
    let quick = "step 3 `c`: no checkpoint is kept after it: it takes less time to run than to keep";
    assert_eq!(said(&world, &abc()), [quick]);
    // That says more than that a quick step before it runs.
    assert_eq!(said(&world, &(abc() + &steps(&[("d", "4")]))), [quick, "step 4 `d`: it is new since bake 01J0 (2 min ago)"]);
}

#[test]
fn the_seal_and_the_tests_alone() {
    let mut world = World::default();
    let tested = abc() + "[[test]]\nshell = 'x'\n";
    world.bake(&web(&tested), DAY);
    assert_eq!(said(&world, &tested.replace("'x'", "'y'")), ["tests: the tests changed since bake 01J0 (24 h ago)"]);
    let explanation = world.explain(&web(&tested.replace("'x'", "'y'")), &Options::default());
    assert_eq!((explanation.start.from, explanation.estimate.seconds), (Origin::Image, 7.0), "only the tests run");
    world.records[0].tests = None;
    world.passed.clear();
    assert_eq!(said(&world, &tested), ["tests: the image has not passed them"]);
    world.drop_images();
    assert_eq!(said(&world, &tested), ["seal: its image is no longer in the store"]);
    let explanation = world.explain(&web(&tested), &Options::default());
    assert_eq!(explanation.tests.unwrap().reason.unwrap().to_string(), "after the seal, which runs");
}

#[test]
fn how_old_and_how_long() {
    let mut world = World::default();
    let tested = abc() + "[[test]]\nshell = 'x'\n";
    let explain = |world: &World, rest: &str| world.explain(&web(rest), &Options::default());
    // Nothing is known.
    let first = explain(&world, &tested);
    assert_eq!((first.estimate.seconds, first.estimate.complete, first.start.from), (0.0, false, Origin::Base));

    world.bake(&web(&tested), DAY * 6);
    let ages = |explanation: &Explanation| explanation.steps.iter().map(|step| step.line.age_seconds).collect::<Vec<_>>();
    let same = explain(&world, &tested);
    assert_eq!((ages(&same), same.estimate.seconds, same.estimate.complete), (vec![Some(6 * 86_400); 3], 0.0, true));
    assert_eq!((same.image, same.start.from), (Some(world.records[0].image), Origin::Image));

    // Resume, the step by its name, seal, tests.
    let changed = explain(&world, &tested.replace('3', "y"));
    assert_eq!((changed.start.from, changed.start.done, changed.start.age_seconds), (Origin::Checkpoint, 2, Some(6 * 86_400)));
    assert_eq!((changed.estimate.seconds, changed.estimate.complete), (1.0 + 10.0 + 5.0 + 7.0, true));
    let json = serde_json::to_value(&changed).unwrap();
    assert_eq!(json["estimate_seconds"], 23.0);
    assert_eq!(json["steps"][1]["cached"], true);
    assert_eq!(json["steps"][2]["kind"], "shell");
    assert_eq!(json["steps"][2]["estimate_seconds"], 10.0);
    assert_eq!(json["steps"][2]["reason"], "`settings` changed since bake 01J0 (6 d ago)");
    assert!(json["base"]["digest"].is_string() && json["start"]["key"].is_string() && json["seal"]["key"].is_string());

    // The very same step tells more than one of the same name.
    world.bake(&web(&tested.replace('3', "quick")), DAY).steps[2].seconds = 1.0;
    assert_eq!(explain(&world, &tested.replace('3', "z")).steps[2].line.estimate_seconds, Some(1.0));
    world.drop_images();
    world.records.pop();
    world.drop_checkpoint(2);
    assert_eq!(explain(&world, &tested).steps[2].line.estimate_seconds, Some(10.0));

    // A new step was never timed: its part of the whole is missing.
    let new = explain(&world, &(tested + &steps(&[("d", "4")])));
    assert!(!new.estimate.complete);
    assert!(serde_json::to_value(&new).unwrap()["estimate_seconds"].is_null());
    // On another base everything boots.
    world.base = Some(Digest::of("other"));
    let other = explain(&world, &abc());
    assert_eq!((other.start.from, other.estimate.seconds), (Origin::Base, 20.0 + 30.0 + 5.0));
}

#[test]
fn a_long_list_is_counted() {
    let shown = |changed: &[&str], added: &[&str], removed: &[&str]| {
        let own = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Changes { changed: own(changed), added: own(added), removed: own(removed) }.to_string()
    };
    assert_eq!(shown(&["a"], &[], &[]), "`a` changed");
    assert_eq!(shown(&["a", "b", "c"], &[], &[]), "`a`, `b` and `c` changed");
    assert_eq!(shown(&["a", "b", "c", "d", "e", "f", "g"], &[], &[]), "`a`, `b`, `c` and 4 more changed");
    assert_eq!(shown(&[], &["a", "b"], &[]), "`a` and `b` were added");
    assert_eq!(shown(&["a"], &["b"], &["c"]), "`a` changed, `b` was added, `c` was removed");
    assert_eq!(shown(&["a", "b"], &["c", "d"], &["e"]), "`a` and `b` changed, `c` was added, and 2 more");
    assert_eq!([span(DAY * 6), span(DAY), span(DAY / 2)], ["6 d", "24 h", "12 h"]);
    assert_eq!([limit_span(DAY * 7), limit_span(Duration::from_secs(90)), limit_span(DAY)], ["7 d", "90 s", "24 h"]);
}
