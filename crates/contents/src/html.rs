//! A difference as one page: no script, nothing fetched, nothing to install, so
//! that it opens from a pipeline's artifacts, on a phone, years later.
//!
//! The page forbids itself scripts and fetching (`Content-Security-Policy`), so
//! that even a mistake in escaping would not run what an image holds. It has no
//! time of its own: the same two images give the same page.

use std::fmt::Write as _;

use kiln_model::Digest;

use crate::diff::config::word;
use crate::diff::table::{Row, counts, package_counts, rows, values, words};
use crate::diff::{Change, Difference, Field, Group, GroupName, Named, PackageChangeKind};
use crate::text::{bytes, change, html};
use crate::{HOME, TOOL, TOOL_VERSION};

/// A directory that came or went with at least so many things in it is one line.
const FOLD: usize = 25;
/// Most lines of a group.
const MOST: usize = 2000;

const STYLE: &str = "
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--text:#1c2330;--dim:#5b6577;--line:#dfe3ea;--link:#1f5fbf;
--add:#14713d;--add-bg:#dcf3e4;--del:#a82a2a;--del-bg:#fbe3e2;--mod:#855a00;--mod-bg:#faeccb}
@media(prefers-color-scheme:dark){:root{--page:#11151c;--card:#191f29;--text:#e3e8f0;--dim:#98a3b5;--line:#2c3543;--link:#86b3f5;
--add:#7fd8a0;--add-bg:#173625;--del:#f59a96;--del-bg:#42201f;--mod:#ebc374;--mod-bg:#3b2f14}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:66rem;margin:0 auto;padding:1.25rem 1rem 3rem}
h1{font-size:1.45rem;line-height:1.3;margin:.25rem 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.05rem;margin:0}
h2 small{font-weight:400;font-size:.88em;margin-left:.3em}
.dim,small{color:var(--dim)}
a{color:var(--link)}
code,.path{font:.86em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;margin:1rem 0}
.card,section{background:var(--card);border:1px solid var(--line);border-radius:10px}
.card{padding:.7rem .9rem}
.card b{display:block;font-size:1.3rem;line-height:1.3;font-variant-numeric:tabular-nums}
section{margin:.9rem 0;padding:.9rem 1rem;overflow:hidden}
section>h2+*{margin-top:.6rem}
table{border-collapse:collapse;width:100%;table-layout:fixed}
th,td{text-align:left;vertical-align:top;padding:.35rem .8rem .35rem 0;border-top:1px solid var(--line);overflow-wrap:anywhere}
thead th{border-top:0;color:var(--dim);font-weight:600}
tbody th{font-weight:500;color:var(--dim);width:9rem}
td.same{color:var(--dim)}
ul{list-style:none;margin:0;padding:0}
li{display:flex;gap:.2rem .7rem;align-items:baseline;padding:.32rem 0;border-top:1px solid var(--line)}
li:first-child{border-top:0}
li>.path{flex:1 1 30%;min-width:0}
li>.what{flex:0 1 auto;max-width:60%;color:var(--dim);text-align:right;overflow-wrap:anywhere;font-size:.92em}
.tag{flex:none;width:6.7em;text-align:center;border-radius:5px;font-size:.78em;line-height:1.6;padding:0 .3em}
.added{color:var(--add);background:var(--add-bg)}
.removed,.downgraded{color:var(--del);background:var(--del-bg)}
.changed,.upgraded{color:var(--mod);background:var(--mod-bg)}
details{border-top:1px solid var(--line)}
details:first-of-type{border-top:0}
summary{cursor:pointer;padding:.5rem 0}
summary::marker{color:var(--dim)}
details>ul{padding:0 0 .6rem .2rem}
li.in{display:block;padding:0 0 0 1.2rem;border:0}
li.in details{border:0}
li.in summary{padding:.1rem 0 .3rem;color:var(--dim)}
.note{border-left:4px solid var(--mod);background:var(--mod-bg);color:var(--text);padding:.5rem .8rem;border-radius:6px;margin:.6rem 0;overflow-wrap:anywhere}
footer{color:var(--dim);font-size:.88em;margin-top:1.5rem}
@media(max-width:40rem){
li{flex-wrap:wrap}
li>.path{flex-basis:calc(100% - 7em)}
li>.what{flex-basis:100%;max-width:none;text-align:left;padding-left:.1rem}
thead{display:none}
table,tbody,tr,th,td{display:block;width:auto!important}
tr{border-top:1px solid var(--line);padding:.4rem 0}
tr:first-child{border-top:0}
tbody th,td{border:0;padding:.05rem 0}
td[data-of]::before{content:attr(data-of);display:block;color:var(--dim);font-size:.8em}
}
@media print{body{background:none}section,.card{break-inside:avoid}}
";

/// One static page that shows a difference.
pub fn page(difference: &Difference) -> String {
    let (a, b) = (&difference.from, &difference.to);
    let title = format!("{} → {}", html(&a.reference), html(&b.reference));
    let mut out = String::from("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
    out.push_str("<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">\n");
    out.push_str(
        "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<meta name=\"referrer\" content=\"no-referrer\">\n",
    );
    let _ = write!(out, "<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n");
    let _ = writeln!(out, "<div class=\"dim\">{}</div>", verdict(difference));
    for note in &difference.notes {
        let _ = writeln!(out, "<div class=\"note\">{}</div>", html(note));
    }
    if difference.differs {
        cards(difference, &mut out);
    }
    images(difference, &mut out);
    fields("Config", &difference.config, &mut out);
    packages(difference, &mut out);
    files(&difference.files, &mut out);
    fields("Provenance", &difference.provenance, &mut out);
    let _ = write!(
        out,
        "<footer>Made by <a href=\"{HOME}\">{TOOL} {TOOL_VERSION}</a> from the images' own disks, without starting them.</footer>\n</main>\n</body>\n</html>\n"
    );
    out
}

fn verdict(difference: &Difference) -> &'static str {
    if !difference.differs {
        "Nothing differs."
    } else if difference.same_disk {
        "The disks hold the same bytes; what is said about the images differs."
    } else if difference.packages.is_empty() && difference.files.is_empty() && difference.notes.is_empty() {
        "Packages and files are the same; the disks' bytes are not (times, free space, or their order)."
    } else {
        "What the second image has that the first has not, and the other way round."
    }
}

fn cards(difference: &Difference, out: &mut String) {
    let (a, b) = (&difference.from, &difference.to);
    let other = difference.files.iter().find(|group| group.group == GroupName::Other);
    let looked_at = other.map_or(0, |group| group.files.len());
    let all = difference.file_count();
    out.push_str("<div class=\"cards\">\n");
    let mut card = |number: String, what: String| {
        let _ = writeln!(out, "<div class=\"card\"><b>{}</b><span class=\"dim\">{}</span></div>", html(&number), html(&what));
    };
    card(difference.packages.len().to_string(), format!("packages: {}", package_counts(difference)));
    card(looked_at.to_string(), "files to look at".to_owned());
    card((all - looked_at).to_string(), "files of changed packages, caches, logs".to_owned());
    card(change(a.used, b.used), format!("in use: {} of {}", bytes(b.used), bytes(b.disk_size)));
    out.push_str("</div>\n");
}

fn images(difference: &Difference, out: &mut String) {
    let (a, b) = (&difference.from, &difference.to);
    let digest = |digest: Option<Digest>| digest.map(|digest| digest.to_string());
    let base = |image: &Named| match (&image.base, image.base_digest) {
        (Some(name), Some(digest)) => Some(format!("{name} (sha256:{})", digest.short())),
        (name, digest) => name.clone().or_else(|| digest.map(|digest| digest.to_string())),
    };
    let list = |names: &[String]| (!names.is_empty()).then(|| names.join(", "));
    let yes = |there: bool| Some(if there { "attached" } else { "none" }.to_owned());
    let rows: [(&str, Option<String>, Option<String>); 13] = [
        ("Name", Some(format!("{}:{}", a.name, a.version)), Some(format!("{}:{}", b.name, b.version))),
        ("Digest", digest(a.digest), digest(b.digest)),
        ("Disk digest", digest(a.disk_digest), digest(b.disk_digest)),
        ("Made", a.created.as_deref().map(time), b.created.as_deref().map(time)),
        ("Base", base(a), base(b)),
        ("Made after", a.predecessor.clone(), b.predecessor.clone()),
        ("Channels", list(&a.channels), list(&b.channels)),
        ("Source commit", a.commit.clone(), b.commit.clone()),
        ("Distribution", a.distribution.clone(), b.distribution.clone()),
        ("Disk", Some(bytes(a.disk_size)), Some(bytes(b.disk_size))),
        ("In use", Some(bytes(a.used)), Some(bytes(b.used))),
        ("Stored as", Some(bytes(a.stored)), Some(bytes(b.stored))),
        ("Provenance", yes(a.provenance), yes(b.provenance)),
    ];
    let (first, second) = (html(&a.reference), html(&b.reference));
    let _ = write!(
        out,
        "<section>\n<h2>Images</h2>\n<table>\n<thead><tr><th style=\"width:9rem\"></th><th>{first}</th><th>{second}</th></tr></thead>\n<tbody>\n"
    );
    for (name, from, to) in rows.iter().filter(|(_, from, to)| from.is_some() || to.is_some()) {
        let cell = |value: &Option<String>| value.as_deref().map_or_else(|| "–".to_owned(), html);
        if from == to {
            let _ = writeln!(out, "<tr><th>{name}</th><td colspan=\"2\" class=\"same\">{}</td></tr>", cell(from));
            continue;
        }
        let _ =
            writeln!(out, "<tr><th>{name}</th><td data-of=\"{first}\">{}</td><td data-of=\"{second}\">{}</td></tr>", cell(from), cell(to));
    }
    out.push_str("</tbody>\n</table>\n</section>\n");
}

fn fields(title: &str, fields: &[Field], out: &mut String) {
    if fields.is_empty() {
        return;
    }
    let _ = write!(out, "<section>\n<h2>{title} <small>{} differ</small></h2>\n<ul>\n", fields.len());
    for field in fields.iter().take(MOST) {
        let what = match (&field.from, &field.to) {
            (None, _) => "added",
            (_, None) => "removed",
            _ => "changed",
        };
        let value = values(field.from.as_deref(), field.to.as_deref());
        let value = value.strip_suffix(" (added)").or(value.strip_suffix(" (removed)")).unwrap_or(&value);
        item(what, &field.field, value, out);
    }
    out.push_str("</ul>\n</section>\n");
}

fn packages(difference: &Difference, out: &mut String) {
    let _ = writeln!(out, "<section>\n<h2>Packages <small>{}</small></h2>", html(&package_counts(difference)));
    if !difference.packages.is_empty() {
        out.push_str("<ul>\n");
        for package in &difference.packages {
            let versions = match (&package.from, &package.to) {
                (Some(from), Some(to)) => format!("{from} → {to}"),
                (from, to) => from.as_deref().or(to.as_deref()).unwrap_or_default().to_owned(),
            };
            let name = match package.change {
                PackageChangeKind::Added | PackageChangeKind::Removed => match &package.summary {
                    Some(summary) => format!("{} – {summary}", package.name),
                    None => package.name.clone(),
                },
                _ => package.name.clone(),
            };
            item(&word(&package.change), &name, &versions, out);
        }
        out.push_str("</ul>\n");
    }
    out.push_str("</section>\n");
}

fn files(groups: &[Group], out: &mut String) {
    let small = if groups.is_empty() { "the same" } else { "" };
    let _ = writeln!(out, "<section>\n<h2>Files <small>{small}</small></h2>");
    for group in groups {
        let open = if group.group == GroupName::Other { " open" } else { "" };
        let title = if group.group == GroupName::Other { "to look at" } else { group.group.title() };
        let _ = writeln!(
            out,
            "<details{open}>\n<summary>{} <span class=\"dim\">– {}</span></summary>\n<ul>",
            html(title),
            html(&counts(group))
        );
        let rows = rows(&group.files, FOLD);
        for row in rows.iter().take(MOST) {
            let what = match row.file.change {
                Change::Added => "added",
                Change::Removed => "removed",
                Change::Changed => "changed",
            };
            let slash = if !row.within.is_empty() { "/" } else { "" };
            let mut text = words(row);
            if let (Some(package), false) = (&row.file.package, group.group == GroupName::Packages) {
                text = format!("{text} · of {package}");
            }
            item(what, &format!("{}{slash}", row.file.path), &text, out);
            inside(row, what, out);
        }
        if rows.len() > MOST {
            let more = format!("… and {} more: kiln diff --files lists them all", rows.len() - MOST);
            let _ = writeln!(out, "<li class=\"dim\">{}</li>", html(&more));
        }
        out.push_str("</ul>\n</details>\n");
    }
    out.push_str("</section>\n");
}

/// What is in a directory that came or went, to be unfolded.
fn inside(row: &Row<'_>, what: &str, out: &mut String) {
    if row.within.is_empty() {
        return;
    }
    let _ = writeln!(out, "<li class=\"in\"><details>\n<summary>show them</summary>\n<ul>");
    for file in row.within.iter().take(MOST) {
        item(what, &file.path, &words(&Row { file, within: &[] }), out);
    }
    if row.within.len() > MOST {
        let _ = writeln!(out, "<li class=\"dim\">… and {} more: kiln diff --files lists them all</li>", row.within.len() - MOST);
    }
    out.push_str("</ul>\n</details></li>\n");
}

/// A time to the minute.
fn time(text: &str) -> String {
    text.parse::<jiff::Timestamp>().map_or_else(|_| text.to_owned(), |time| time.strftime("%Y-%m-%d %H:%M UTC").to_string())
}

fn item(tag: &str, name: &str, what: &str, out: &mut String) {
    let _ = writeln!(
        out,
        "<li><span class=\"tag {tag}\">{tag}</span><span class=\"path\">{}</span><span class=\"what\">{}</span></li>",
        html(name),
        html(what)
    );
}
