//! Plans on clusters whose nodes are not alike, from document to plan and back.

use std::path::Path;

use meshweave_dsl::diagnostics::{SourceId, Sources};
use meshweave_dsl::weave::{Document, parse, print};

use super::*;
use crate::plan::estimate::estimate;
use crate::plan::outer::{search, the_only};
use crate::resolve::resolve;

const MIXED: &str = "plan \"x\" model m cluster both\n\
    model m = llama {\n  layers 16 embed 2048 heads 16 kv_heads 8 ffn 8192 vocab 32000\n}\n\
    cluster new = h100 {\n  nodes 2\n  slow node 1 uplink 25 %\n}\n\
    cluster both {\n  group \"a100-80:16\"\n  group new\n}\n\
    train batch 96 seq 4096\n\
    mesh main = pp:auto{2,4} > dp:rest > tp:auto{1,2,8}\n";

fn request(document: &Document) -> MappingRequest {
    let (request, found) = resolve(document, Path::new("."), &mut Sources::new());
    let request = request.unwrap_or_else(|| panic!("{found:?}"));
    let ModelSource::Decoder(config) = &request.model else {
        panic!("no decoder");
    };
    let (mapping, found) = mapping_request(document, &request, config);
    mapping.unwrap_or_else(|| panic!("{found:?}"))
}

#[test]
fn a_plan_on_a_mixed_cluster_says_its_nodes_and_reads_back() {
    let document = parse(MIXED, SourceId(0)).document;
    let asked = request(&document);
    let (workload, cluster) = (&asked.workload, &asked.cluster);
    let found = search(workload, cluster, &asked.space(), &asked.options).unwrap();
    let placed = (&found.best.mapping, &found.placed);
    let printed = print(&print_mapping(&document, &asked, placed, &[]));
    let reparsed = parse(&printed, SourceId(0)).document;
    assert_eq!(print(&reparsed), printed);
    let read = request(&reparsed.freeze());
    assert_eq!(read.cluster, found.placed, "{printed}");
    let mapping = the_only(&read.workload, &read.cluster, &read.space()).unwrap();
    assert_eq!(mapping, found.best.mapping, "{printed}");
    let again = estimate(&read.workload, &mapping, &read.cluster).unwrap();
    assert_eq!(again, found.best.estimate);
    assert!(!print(&reparsed.thaw()).contains(":="));
}

#[test]
fn nodes_that_a_mesh_names_are_the_only_ones_taken() {
    let text = MIXED.replace("tp:auto{1,2,8}", "tp:auto{1,2,8} on nodes[2..4,0]");
    let document = parse(&text, SourceId(0)).document;
    let asked = request(&document);
    assert_eq!(asked.cluster.order, [2, 3, 0]);
    let found = search(
        &asked.workload,
        &asked.cluster,
        &asked.space(),
        &asked.options,
    );
    let found = found.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(found.placed.order, [2, 3, 0]);
    assert!(found.best.mapping.n_ranks() <= 24);
    let (none, findings) = {
        let text = MIXED.replace("tp:auto{1,2,8}", "tp:auto on nodes[2..9]");
        let document = parse(&text, SourceId(0)).document;
        let (request, _) = resolve(&document, Path::new("."), &mut Sources::new());
        let request = request.unwrap();
        let ModelSource::Decoder(config) = &request.model else {
            panic!("no decoder");
        };
        mapping_request(&document, &request, config)
    };
    assert!(none.is_none());
    assert_eq!(
        findings[0].message,
        "there is no node 4: cluster `both` has 4, from 0 to 3"
    );
}
