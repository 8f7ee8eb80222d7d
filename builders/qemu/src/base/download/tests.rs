use super::*;
use crate::base::testing::{Fault, Heard, Server, disk};
use kiln_model::secret::Redactor;
use std::sync::Arc;

struct Bench {
    folder: tempfile::TempDir,
    server: Server,
    body: Vec<u8>,
    heard: Arc<Heard>,
}

impl Bench {
    fn new() -> Self {
        let body = disk(300_000);
        Self { folder: tempfile::tempdir().unwrap(), server: Server::start(&body), body, heard: Arc::default() }
    }

    fn downloader(&self) -> Downloader {
        let patience = Patience { failures: 4, first: Duration::from_millis(1), longest: Duration::from_secs(3) };
        let reports = Reports::new(self.heard.clone(), Redactor::default());
        Downloader::new(&Site::default(), self.server.url("/disk.raw"), patience, reports).unwrap()
    }

    fn part(&self) -> PathBuf {
        self.folder.path().join("x.part")
    }

    async fn run(&self) -> Result<()> {
        self.downloader().download(&sha512(&self.body), &self.part()).await
    }

    fn assert_whole(&self) {
        assert!(std::fs::read(self.part()).unwrap() == self.body);
        assert!(!origin_of(&self.part()).exists());
    }
}

fn sha512(bytes: &[u8]) -> Checksum {
    let mut hasher = Hasher::new(Algorithm::Sha512);
    hasher.update(bytes);
    hasher.finish()
}

#[tokio::test]
async fn a_cut_download_goes_on_where_it_was() {
    let bench = Bench::new();
    bench.server.fault(Fault::Cut(100_000)).fault(Fault::Cut(50_000));
    bench.run().await.unwrap();
    bench.assert_whole();
    assert_eq!(bench.server.state().served, bench.body.len(), "no byte came twice");
    assert_eq!(bench.server.ranges(), [None, Some("bytes=100000-".into()), Some("bytes=150000-".into())]);
    assert_eq!(bench.server.state().requests[1].if_range.as_deref(), Some("\"one\""));
}

#[tokio::test]
async fn an_interrupted_run_leaves_the_partial_and_the_next_one_goes_on() {
    let bench = Bench::new();
    bench.server.fault(Fault::Hang(120_000));
    let until = async {
        while std::fs::metadata(bench.part()).map_or(0, |m| m.len()) < 120_000 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        result = bench.run() => panic!("ended: {result:?}"),
        () = until => {}
    }
    assert_eq!(std::fs::read(bench.part()).unwrap(), bench.body[..120_000]);
    bench.run().await.unwrap();
    bench.assert_whole();
    assert_eq!(bench.server.state().served, bench.body.len());
    assert!(bench.heard.notes().iter().any(|n| n.contains("goes on")), "{:?}", bench.heard.notes());
}

#[tokio::test]
async fn a_run_interrupted_after_the_last_byte_needs_no_further_one() {
    let bench = Bench::new();
    std::fs::write(bench.part(), &bench.body).unwrap();
    bench.run().await.unwrap();
    bench.assert_whole();
    assert_eq!(bench.server.state().served, 0);
}

#[tokio::test]
async fn a_server_without_ranges_is_asked_for_the_whole() {
    let bench = Bench::new();
    bench.server.fault(Fault::Cut(100_000)).fault(Fault::Whole);
    bench.run().await.unwrap();
    bench.assert_whole();
    assert_eq!(bench.server.state().served, 100_000 + bench.body.len());
}

#[tokio::test]
async fn a_file_replaced_between_two_attempts_starts_over() {
    let bench = Bench::new();
    std::fs::write(bench.part(), vec![7; 1000]).unwrap();
    std::fs::write(origin_of(&bench.part()), r#"{"version":"\"zero\"","encoding":null}"#).unwrap();
    bench.run().await.unwrap();
    bench.assert_whole();
    assert_eq!(bench.server.ranges(), [Some("bytes=1000-".into())]);
}

#[tokio::test]
async fn parts_that_do_not_fit_are_dropped_once() {
    let bench = Bench::new();
    bench.server.state().tag = None;
    std::fs::write(bench.part(), vec![7; 1000]).unwrap();
    bench.run().await.unwrap();
    bench.assert_whole();
    assert_eq!(bench.server.ranges(), [Some("bytes=1000-".into()), None]);
}

#[tokio::test]
async fn a_mismatch_names_both_digests_and_keeps_nothing() {
    let bench = Bench::new();
    let expected = sha512(b"something else");
    bench.server.state().headers = "Content-Encoding: gzip\r\n".into();
    let error = bench.downloader().download(&expected, &bench.part()).await.unwrap_err();
    assert_eq!(error.kind(), Code::DigestMismatch);
    let text = error.to_string();
    assert!(text.contains(&expected.to_string()) && text.contains(&sha512(&bench.body).to_string()), "{text}");
    assert!(error.details()[0].contains("Content-Encoding: gzip"));
    assert_eq!(std::fs::read_dir(bench.folder.path()).unwrap().count(), 0);
    assert_eq!(bench.server.state().served, bench.body.len());
}

#[tokio::test]
async fn a_content_encoding_is_not_decoded() {
    let bench = Bench::new();
    bench.server.state().headers = "Content-Encoding: gzip\r\n".into();
    bench.run().await.unwrap();
    bench.assert_whole();
}

#[tokio::test]
async fn a_busy_server_is_asked_again() {
    let bench = Bench::new();
    bench.server.fault(Fault::Answer("503 Busy", String::new()));
    bench.server.fault(Fault::Answer("429 Slow", "Retry-After: 1\r\n".into()));
    let since = Instant::now();
    bench.run().await.unwrap();
    bench.assert_whole();
    assert!(since.elapsed() >= Duration::from_secs(1), "Retry-After was not kept");
    assert_eq!(bench.server.state().requests.len(), 3);
}

#[tokio::test]
async fn a_server_that_asks_for_an_hour_is_not_waited_for() {
    let bench = Bench::new();
    bench.server.fault(Fault::Answer("429 Slow", "Retry-After: 3600\r\n".into()));
    let error = bench.run().await.unwrap_err();
    assert_eq!(error.kind(), Code::Infrastructure);
    assert!(error.next_move().unwrap().contains("3600"));
}

#[tokio::test]
async fn attempts_end() {
    let bench = Bench::new();
    for _ in 0..9 {
        bench.server.fault(Fault::Answer("500 No", String::new()));
    }
    let error = bench.run().await.unwrap_err();
    assert_eq!(error.kind(), Code::Infrastructure);
    assert_eq!(bench.server.state().requests.len(), 4);
    // Nor does a server help that ignores Range and always cuts at one place.
    let bench = Bench::new();
    for _ in 0..9 {
        bench.server.fault(Fault::WholeCut(5000));
    }
    let error = bench.run().await.unwrap_err();
    assert_eq!(error.kind(), Code::Infrastructure);
    // The first 5000 bytes are further than nothing, what follows is not.
    assert_eq!(bench.server.state().requests.len(), 4);
    assert_eq!(std::fs::metadata(bench.part()).unwrap().len(), 5000);
}

#[tokio::test]
async fn a_weak_tag_is_not_used() {
    let bench = Bench::new();
    bench.server.state().tag = Some("W/\"weak\"".into());
    bench.server.fault(Fault::Cut(100_000));
    bench.run().await.unwrap();
    bench.assert_whole();
    assert_eq!(bench.server.state().requests[1].if_range, None);
}

#[tokio::test]
async fn what_will_not_pass_is_not_tried_again() {
    let bench = Bench::new();
    for (status, headers, why) in [
        ("404 Not Found", String::new(), "404"),
        ("403 Forbidden", String::new(), "403"),
        ("302 Found", "Location: ftp://example.org/x\r\n".into(), "cannot download"),
    ] {
        bench.server.fault(Fault::Answer(status, headers));
        let before = bench.server.state().requests.len();
        let error = bench.run().await.unwrap_err();
        assert_eq!(error.kind(), Code::Base, "{error:?}");
        assert!(error.chain().contains(why), "{error:?}");
        assert_eq!(bench.server.state().requests.len(), before + 1);
    }
}

#[tokio::test]
async fn a_server_that_is_not_there() {
    let bench = Bench::new();
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let patience = Patience { failures: 2, first: Duration::from_millis(1), longest: Duration::from_secs(1) };
    let url = format!("http://user:hunter2@{gone}/disk.raw?key=hunter3").parse().unwrap();
    let downloader = Downloader::new(&Site::default(), url, patience, Reports::silent()).unwrap();
    let error = downloader.download(&sha512(b""), &bench.part()).await.unwrap_err();
    assert_eq!(error.kind(), Code::Infrastructure);
    assert!(!format!("{error:?}").contains("hunter"), "{error:?}");
}

#[test]
fn content_ranges() {
    for (text, first, total) in [
        ("bytes 100-199/200", Some(100), Some(200)),
        ("bytes 100-199/*", Some(100), None),
        ("bytes */200", None, Some(200)),
        ("lines 1-2/3", None, None),
        ("bytes", None, None),
        ("bytes 99999999999999999999-1/2", None, Some(2)),
    ] {
        assert_eq!(content_range(text), ContentRange { first, total }, "{text}");
    }
}
