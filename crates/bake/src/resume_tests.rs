use std::time::Duration;

use kiln_model::Digest;
use kiln_model::checkpoint::CheckpointCache as _;

use super::{Found, Options, Refusal, Reuse};
use crate::testing::{DAY, World, read, steps, web};

const WEEK: Duration = Duration::from_secs(7 * 24 * 3600);

fn abc() -> String {
    steps(&[("a", "1"), ("b", "2"), ("c", "3")])
}

/// `abc` with a line for one of the steps.
fn abc_with(step: &str, line: &str) -> String {
    let name = format!("name = '{step}'\n");
    abc().replace(&name, &format!("{name}{line}\n"))
}

fn from(step: &str) -> Options {
    Options { from: Some(step.into()), ..Options::default() }
}

/// How many steps are done at each point, or that an image is used.
fn shown(world: &World, text: &str, options: &Options) -> (String, Vec<Option<Refusal>>) {
    let decision = world.try_decide(text, options).unwrap();
    let reuse = match &decision.reuse {
        Reuse::Image(found) => format!("image {}", found.record.bake),
        Reuse::Points(points) => points.iter().map(|point| point.done.to_string()).collect::<Vec<_>>().join(" "),
    };
    (reuse, decision.refused)
}

fn found(world: &World, text: &str) -> Option<Found> {
    let decision = world.try_decide(text, &Options::default()).unwrap();
    match decision.reuse {
        Reuse::Image(found) => {
            assert!(found.same_config);
            Some(*found)
        }
        Reuse::Points(_) => decision.unfit.map(|found| *found),
    }
}

#[test]
fn what_a_bake_goes_on_from() {
    fn baked(world: &mut World) {
        world.bake(&web(&abc()), DAY);
    }
    fn last_week(world: &mut World) {
        world.bake(&web(&abc()), DAY * 8);
    }
    fn no_image(world: &mut World) {
        baked(world);
        world.drop_images();
    }
    let no = || vec![Some(Refusal::NotKept); 3];
    let old = |step, age: u32| Some(Refusal::TooOld { step, age: DAY * age, limit: WEEK });
    let (never, from_0, from_2) = (Some(Refusal::Never(1)), Some(Refusal::From(0)), Some(Refusal::From(2)));
    let plain = Options::default;
    let no_cache = Options { no_cache: true, ..plain() };
    let fresh = Options { fresh: true, ..plain() };
    let machine = Options { machine: true, ..plain() };
    let b_always = || abc_with("b", "cache = false");
    let half_a_day = Some(Refusal::TooOld { step: 1, age: DAY, limit: DAY / 2 });

    type Case = (&'static str, fn(&mut World), String, Options, &'static str, Vec<Option<Refusal>>);
    let cases: Vec<Case> = vec![
        ("nothing was baked", |_| (), abc(), plain(), "", no()),
        ("nothing has changed", baked, abc(), plain(), "image 01J0", vec![None; 3]),
        ("the machine is wanted", baked, abc(), machine, "3 2 1 0", vec![None; 3]),
        ("the image is gone", no_image, abc(), plain(), "3 2 1 0", vec![None; 3]),
        ("another last step", baked, abc().replace('3', "x"), plain(), "2 1 0", vec![None, None, no()[0]]),
        ("another first step", baked, abc().replace('1', "x"), plain(), "0", no()),
        (
            "one checkpoint is gone",
            |world| {
                no_image(world);
                world.drop_checkpoint(2);
            },
            abc(),
            plain(),
            "2 1 0",
            vec![None, None, no()[0]],
        ),
        (
            "a hole is jumped over",
            |world| {
                no_image(world);
                world.drop_checkpoint(1);
            },
            abc(),
            plain(),
            "3 1 0",
            vec![None, no()[0], None],
        ),
        // Options.
        ("--no-cache keeps the booted base", baked, abc(), no_cache, "0", vec![Some(Refusal::NoCache); 3]),
        ("--fresh keeps nothing", baked, abc(), fresh, "", vec![Some(Refusal::Fresh); 3]),
        ("--from the last", baked, abc(), from("c"), "2 1 0", vec![None, None, from_2]),
        ("--from the first", baked, abc(), from("a"), "0", vec![from_0; 3]),
        ("--from behind what always runs", baked, b_always(), from("c"), "1 0", vec![None, never, never]),
        ("--from before what always runs", baked, b_always(), from("a"), "0", vec![from_0; 3]),
        // Age.
        ("cache = false", baked, b_always(), plain(), "1 0", vec![None, never, never]),
        ("too old, but for the base", last_week, abc(), plain(), "0", vec![old(0, 8); 3]),
        ("one may be older", last_week, abc_with("a", "cache = 'forever'"), plain(), "1 0", vec![None, old(1, 8), old(1, 8)]),
        ("one must be younger", baked, abc_with("b", "cache = '12h'"), plain(), "1 0", vec![None, half_a_day, half_a_day]),
        ("all may be older", last_week, format!("[cache]\nmax_age = 'forever'\n{}", abc()), plain(), "image 01J0", vec![None; 3]),
        ("as old as it may be", |world| drop(world.bake(&web(&abc()), WEEK).clone()), abc(), plain(), "image 01J0", vec![None; 3]),
        // Without a base there is no key.
        (
            "no base",
            |world| {
                baked(world);
                world.base = None;
            },
            abc(),
            plain(),
            "",
            vec![Some(Refusal::NoBase); 3],
        ),
        (
            "another base",
            |world| {
                baked(world);
                world.base = Some(Digest::of("x"));
            },
            abc(),
            plain(),
            "",
            no(),
        ),
        (
            "without steps",
            |world| {
                world.bake(&web(""), DAY * 99);
                world.drop_images();
            },
            String::new(),
            plain(),
            "0",
            vec![],
        ),
    ];
    for (what, before, rest, options, reuse, refused) in cases {
        let mut world = World::default();
        before(&mut world);
        assert_eq!(shown(&world, &web(&rest), &options), (reuse.to_owned(), refused), "{what}");
    }
}

#[test]
fn a_point_says_what_to_ask_the_cache_for() {
    let mut world = World::default();
    let text = web(&abc_with("b", "cache = '48h'"));
    world.bake(&text, DAY);
    world.drop_images();
    let template = read(&text);
    let plan = world.plan(&template);
    let Reuse::Points(points) = world.try_decide(&text, &Options::default()).unwrap().reuse else { panic!() };
    let asked: Vec<_> = points.iter().map(|point| (point.key, point.max_age)).collect();
    let key = |step: usize| plan.steps[step].key.unwrap();
    assert_eq!(asked, [(key(2), Some(DAY * 2)), (key(1), Some(DAY * 2)), (key(0), Some(WEEK)), (plan.start.unwrap(), None)]);
}

#[test]
fn the_age_of_a_step_is_that_of_its_run_and_not_of_the_checkpoint_that_holds_it() {
    let mut world = World::default();
    world.bake(&web(&steps(&[("a", "1")])), DAY * 8);
    world.bake(&web(&steps(&[("a", "1"), ("b", "2")])), DAY * 2);
    world.drop_images();
    let text = web(&steps(&[("a", "1"), ("b", "2")]));
    let old = Some(Refusal::TooOld { step: 0, age: DAY * 8, limit: WEEK });
    assert_eq!(shown(&world, &text, &Options::default()), ("0".to_owned(), vec![old, old]));
    // A bake that failed has left no record, but maybe the step's checkpoint.
    let mut unrecorded = std::mem::take(&mut world.records);
    assert_eq!(shown(&world, &text, &Options::default()).1, [old, old]);
    // Where nobody knows, the checkpoint's own age has to do.
    world.kept.drop_damaged(world.kept.find(&unrecorded[0].steps[0].key, None, &|_| ()).unwrap().unwrap()).unwrap();
    assert_eq!(shown(&world, &text, &Options::default()), ("2 0".to_owned(), vec![Some(Refusal::NotKept), None]));
    // That the first step ran anew yesterday makes no older checkpoint younger.
    world.records.append(&mut unrecorded);
    let mut again = world.records[0].clone();
    again.steps[0].made += 7 * 24 * 3600;
    world.records.push(again);
    assert_eq!(shown(&world, &text, &Options::default()).1, [Some(Refusal::NotKept), old]);
}

#[test]
fn an_image_is_used_with_its_config_whatever_its_tests() {
    let mut world = World::default();
    let tested = web(&(abc() + "[[test]]\nshell = 'x'\n"));
    let image = |world: &World, text: &str| matches!(world.try_decide(text, &Options::default()).unwrap().reuse, Reuse::Image(_));
    world.bake(&tested, DAY).tests = None;
    world.passed.clear();
    assert!(!found(&world, &tested).unwrap().tested && image(&world, &tested), "to test it nothing is baked");
    assert!(found(&world, &web(&abc())).unwrap().tested, "there are none");
    // The same disk passes them later; other tests are no evidence.
    world.bake(&tested, DAY / 2);
    assert!(found(&world, &tested).unwrap().tested && image(&world, &tested.replace("'x'", "'y'")));
    assert!(!found(&world, &tested.replace("'x'", "'y'")).unwrap().tested);
    // Names of steps and labels are in the config, and not on the disk.
    for other in [tested.replace("'a'", "'other'"), tested.replace("[base]", "labels = { team = 'shop' }\n[base]")] {
        let found = found(&world, &other).unwrap();
        assert!(found.tested && !found.same_config);
    }
    let labelled = tested.replace("[base]", "labels = { team = 'shop' }\n[base]");
    world.bake(&labelled, DAY / 4);
    assert_eq!(found(&world, &labelled).unwrap().record.bake, "01J2");
    let found = found(&world, &tested).unwrap();
    assert!(found.same_config && found.record.bake == "01J1", "the newest that fits");
}

#[test]
fn a_step_that_is_not_there_is_told_with_those_that_are() {
    let error = World::default().try_decide(&web(&steps(&[("packages", "1"), ("site", "2")])), &from("sites")).unwrap_err();
    assert_eq!(error.kind().exit_status(), 2);
    assert_eq!(error.next_move(), Some("did you mean `site`? The steps are: packages, site"));
    let error = World::default().try_decide(&web(&abc()), &from("whatever")).unwrap_err();
    assert_eq!(error.next_move(), Some("the steps are: a, b, c"));
}
