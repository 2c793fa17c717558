// Opens the chat page, asks, takes a picture: URL PICTURE WIDTH HEIGHT CHROMIUM [stop]; what was seen as JSON.
import puppeteer from "puppeteer-core";

const [url, picture, width, height, chromium, stop] = process.argv.slice(2);
const args = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run"];
const browser = await puppeteer.launch({ executablePath: chromium, args, protocolTimeout: 300000 });
const page = await browser.newPage();
const hosts = new Set();
const problems = [];
page.on("request", (request) => hosts.add(new URL(request.url()).host));
page.on("pageerror", (error) => problems.push(String(error)));
page.on("console", (message) => message.type() === "error" && problems.push(message.text()));
await page.setViewport({ width: +width, height: +height });
await page.goto(url);
await page.waitForFunction(() => !document.getElementById("send").disabled || document.querySelector(".error"), { timeout: 120000 });
const state = () => page.$eval("#state", (element) => element.textContent);
const loaded = await state();
const states = new Set();
await page.exposeFunction("saw", (text) => states.add(text.replace(/[\d.]+/g, "N")));
await page.evaluate(() => {
  const target = document.getElementById("state");
  new MutationObserver(() => window.saw(target.textContent)).observe(target, { childList: true });
});
await page.type("#text", "What do the gulls want?");
await page.keyboard.press("Enter");
if (stop) {
  await page.waitForFunction(() => /^[2-9]\d* tokens/.test(document.getElementById("state").textContent), { timeout: 240000 });
  await page.click("#stop");
}
await page.waitForFunction(() => /first after|stopped|failed/.test(document.getElementById("state").textContent), { timeout: 240000 });
await page.screenshot({ path: picture });
const turns = await page.$$eval(".turn", (all) => all.map((one) => [one.className, one.textContent]));
const overflow = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
const button = await page.$eval("#send", (element) => element.getBoundingClientRect().bottom);
console.log(JSON.stringify({ loaded, state: await state(), states: [...states], turns, overflow, button, hosts: [...hosts], problems }));
await browser.close();
