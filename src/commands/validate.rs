//! `kiln validate`: reports every mistake of a template at once.

use std::path::Path;

use kiln_bake::template::{Inputs, Mistakes, Template, load};
use kiln_model::settings::{Problem, Source};
use kiln_model::{Code, Error, Result};
use serde_json::json;

use super::App;
use crate::cli::{TemplateArgs, Variables};
use crate::output::{print_json, show_mistakes, show_warnings};
use crate::registry::Registry;

pub(super) fn run(app: &App, arguments: &TemplateArgs) -> Result<u8> {
    let registry = Registry::new(&app.home, &crate::site::load()?.bases);
    match load(&arguments.template, &inputs(&arguments.variables), &registry.kinds()) {
        Ok(template) => {
            show_warnings(&template.sources, &template.warnings);
            let value =
                json!({ "ok": true, "name": template.name, "version": template.version, "steps": template.steps.len(), "mistakes": [] });
            app.output.result(&value, || format!("{}: no mistakes ({}:{})", template.path.display(), template.name, template.version));
            Ok(0)
        }
        Err(mistakes) => {
            show_mistakes(&mistakes.sources, &mistakes.problems.0);
            if app.output.is_json() {
                let list: Vec<_> = mistakes.problems.0.iter().map(|problem| as_json(&mistakes.sources, problem)).collect();
                print_json(&json!({ "ok": false, "mistakes": list }));
            }
            Ok(Code::Usage.exit_status())
        }
    }
}

/// Loads a template for a command that works with it; shows its mistakes.
pub(crate) fn load_or_explain(path: &Path, variables: &Variables, registry: &Registry) -> Result<Template> {
    match load(path, &inputs(variables), &registry.kinds()) {
        Ok(template) => {
            show_warnings(&template.sources, &template.warnings);
            Ok(template)
        }
        Err(mistakes) => {
            show_mistakes(&mistakes.sources, &mistakes.problems.0);
            Err(summary(&mistakes))
        }
    }
}

pub(super) fn summary(mistakes: &Mistakes) -> Error {
    let list: Vec<_> = mistakes.problems.0.iter().map(|problem| problem.message.clone()).collect();
    Error::new(Code::Usage, format!("the template has mistakes: {}", list.join("; "))).next("mend the template; `kiln validate` checks it")
}

pub(super) fn inputs(variables: &Variables) -> Inputs {
    Inputs {
        vars: variables.vars.clone(),
        var_files: variables.var_files.clone(),
        // What is not UTF-8 cannot be a template's value.
        environment: std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?))).collect(),
        builder: variables.builder.clone(),
        ..Inputs::default()
    }
}

fn as_json(sources: &[Source], problem: &Problem) -> serde_json::Value {
    let place = problem.place.and_then(|place| {
        let source = sources.get(place.source)?;
        let before = source.text.get(..place.start)?;
        let column = before.rsplit('\n').next().map_or(0, |line| line.chars().count()) + 1;
        Some(json!({
            "file": source.name, "line": before.matches('\n').count() + 1, "column": column,
            "text": source.text.get(place.start..place.end),
        }))
    });
    json!({ "message": problem.message, "label": problem.label, "help": problem.help, "place": place })
}
