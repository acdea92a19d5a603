use super::*;
use crate::import::read_config;
use crate::plan::estimate::Job;

fn model(name: &str) -> crate::model::DecoderConfig {
    let path = format!(
        "{}/../examples/models/{name}/config.json",
        env!("CARGO_MANIFEST_DIR")
    );
    let text = std::fs::read_to_string(&path).unwrap();
    read_config(&path, &text).unwrap().config
}

#[test]
fn speed() {
    for (name, cluster, batch, seq) in [
        ("llama-3-8b", "h100:64", 512, 8192),
        ("llama-3.1-405b", "h100:16384", 2048, 8192),
        ("deepseek-v3", "h100:2048", 15360, 4096),
    ] {
        let workload = Workload::new(model(name), batch, seq, Job::Train);
        let cluster = Cluster::preset(cluster).unwrap();
        let space = Space::everything(&workload, &cluster);
        let found = search(&workload, &cluster, &space, &Options::default());
        match found {
            Ok(found) => {
                println!(
                    "{name}: {} {:.3}s mfu {:.3} solve {:.2}s {:?}",
                    found.best.mapping,
                    found.best.estimate.step_s,
                    found.best.estimate.mfu,
                    found.solve_s,
                    found.certificate
                );
                println!("{:?}", found.best.estimate.parts);
                for r in found.runners_up.iter().take(4) {
                    println!("   {} {:.3}", r.mapping, r.estimate.step_s);
                }
            }
            Err(e) => println!("{name}: {e}"),
        }
    }
}
